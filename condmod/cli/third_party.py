"""The commands that plugins bring, known from metadata; one that fails takes no other with it."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import typer

from condmod.entries import module_of, owner, provenance, shut_out
from condmod.errors import PluginConflictError, PluginError, told

OWN = ("list", "show", "validate", "schema", "doctor", "plugins", "plan")


def brought() -> dict[str, list[metadata.EntryPoint]]:
    """The commands that installed distributions bring, by name; nothing is imported."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for point in metadata.entry_points(group="condmod.commands"):
        if not shut_out(owner(point)[0]):
            found.setdefault(point.name, []).append(point)
    return found


def load(name: str, points: list[metadata.EntryPoint]) -> Any:
    """The command of this name.

    Raises:
        PluginConflictError: two distributions have it, or condmod itself has it.
        PluginError: what brings it failed, or lacks an extra; its cause is what was raised.
    """
    owners = sorted({provenance(point) for point in points})
    owners += [f"condmod {metadata.version('condmod')}"] if name in OWN else []
    if len(points) > 1 or name in OWN:
        raise PluginConflictError(
            f"the command {name!r} is claimed by {' and '.join(owners)}; uninstall one, or shut "
            "it out with CONDMOD_DISABLE=<distribution>"
        )
    try:
        return _command(name, points[0].load())
    except (Exception, SystemExit) as error:
        raise PluginError(
            lacking(points[0], error)
            or f"the command {name!r} comes from {owners[0]}, whose module {module_of(points[0])} "
            f"failed: {told(error)}; `condmod doctor` shows the traceback"
        ) from error


def load_or_tell(name: str, points: list[metadata.EntryPoint]) -> Any:
    """The command of this name; where it fails, one that raises the reason when it is run."""
    try:
        return load(name, points)
    except PluginError as error:
        reason = error

    def failed() -> None:
        raise reason

    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    return _command(
        name,
        failed,
        help="failed; see condmod doctor",
        add_help_option=False,
        context_settings=anything,
    )


def lacking(point: metadata.EntryPoint, error: BaseException) -> str:
    """How to install the extra that a command declares, where it is what `error` lacks."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if not point.extras or missing in (None, module_of(point)):
        return ""
    wanted = f"{owner(point)[0]}[{','.join(point.extras)}]"
    return f"`condmod {point.name}` needs {missing}; install it with: pip install '{wanted}'"


def check() -> dict[str, PluginError | None]:
    """Load every command; gives what is wrong with it. An extra that is not there is not wrong."""
    verdicts: dict[str, PluginError | None] = {}
    for name, points in sorted(brought().items()):
        try:
            load(name, points)
            verdicts[name] = None
        except PluginError as error:
            optional = error.__cause__ is not None and lacking(points[0], error.__cause__)
            verdicts[name] = None if optional else error
    return verdicts


def _command(name: str, function: Any, **options: Any) -> Any:
    app = typer.Typer(add_completion=False)
    app.command(name, rich_help_panel="Commands", **options)(function)
    return typer.main.get_command(app)
