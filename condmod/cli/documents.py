"""The kinds of YAML file that plugins read, so that `validate` and `schema` know them."""

from __future__ import annotations

import importlib
from importlib import metadata

import pluggy

from condmod import hooks
from condmod.entries import module_of, owner, provenance, shut_out
from condmod.errors import PluginError, told


def documents() -> dict[str, hooks.Document]:
    """Every kind of document of every plugin, by name; a plugin that fails brings none."""
    found: dict[str, hooks.Document] = {}
    for point in _points():
        try:
            found.update(_kinds(point))
        except PluginError:  # `check` tells of it
            continue
    return found


def check() -> dict[str, PluginError | None]:
    """Load every plugin of the group `condmod.plugins`, by module; gives what is wrong with it."""
    verdicts: dict[str, PluginError | None] = {}
    for point in _points():
        verdicts.setdefault(module_of(point), None)
        try:
            _kinds(point)
        except PluginError as error:
            verdicts[module_of(point)] = error
    return verdicts


def _points() -> list[metadata.EntryPoint]:
    points = metadata.entry_points(group="condmod.plugins")
    return [point for point in points if not shut_out(owner(point)[0])]


def _kinds(point: metadata.EntryPoint) -> dict[str, hooks.Document]:
    """The kinds of one plugin, asked alone."""
    manager = pluggy.PluginManager("condmod")
    manager.add_hookspecs(hooks)
    found: dict[str, hooks.Document] = {}
    try:
        manager.register(importlib.import_module(module_of(point)))
        for kinds in manager.hook.condmod_documents():
            found.update(kinds)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"the plugin {point.name!r} comes from {provenance(point)}, whose module "
            f"{module_of(point)} failed: {told(error)}; `condmod doctor` shows the traceback"
        ) from error
    return found
