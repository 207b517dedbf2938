"""The command `condmod`: its own commands, and those that plugins bring, loaded on use."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

import typer
from typer.core import TyperGroup

from condmod.cli import commands
from condmod.entries import shut_out
from condmod.errors import CondmodError

HELP = "Condition any network on any signal, each mechanism chosen by one short string."


class CommandGroup(TyperGroup):
    """The group of commands; asks entry points of `condmod.commands` for what it lacks."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands, ours first."""
        return [*super().list_commands(ctx), *sorted(brought())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by name; a plugin's is loaded now."""
        own = super().get_command(ctx, cmd_name)
        point = brought().get(cmd_name)
        return own if own is not None or point is None else _load(point)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; a user's error is one clear line and exit code 1, Ctrl-C is 130."""
        try:
            return super().invoke(ctx)
        except CondmodError as error:
            typer.echo(f"error: {error}", err=True)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise SystemExit(130) from None
        except ModuleNotFoundError as error:
            point = brought().get(ctx.invoked_subcommand or "")
            if point is None or not point.extras or not point.dist:
                raise
            wanted = f"{point.dist.metadata['Name']}[{','.join(point.extras)}]"
            typer.echo(
                f"error: `condmod {point.name}` needs {error.name}; "
                f"install it with: pip install '{wanted}'",
                err=True,
            )
            raise SystemExit(1) from None


def brought() -> dict[str, metadata.EntryPoint]:
    """The commands that installed distributions bring, by name; nothing is imported."""
    points = metadata.entry_points(group="condmod.commands")
    return {p.name: p for p in points if not (p.dist and shut_out(p.dist.metadata["Name"]))}


def _load(point: metadata.EntryPoint) -> Any:
    app = typer.Typer(add_completion=False)
    app.command(point.name, rich_help_panel="Commands")(point.load())
    return typer.main.get_command(app)


app = typer.Typer(cls=CommandGroup, help=HELP, no_args_is_help=True, add_completion=False)
for _function, _name in (
    (commands.list_, "list"),
    (commands.show, "show"),
    (commands.validate, "validate"),
    (commands.schema, "schema"),
    (commands.doctor, "doctor"),
    (commands.plugins, "plugins"),
):
    app.command(_name)(_function)


def main() -> None:
    """The console script."""
    sys.exit(app())
