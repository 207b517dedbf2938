"""The command `condmod`: its own commands, and those that plugins bring, loaded on use."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from condmod import __version__
from condmod.cli import commands, components
from condmod.cli.third_party import OWN, brought, lacking, load_or_tell
from condmod.errors import CondmodError


class CommandGroup(TyperGroup):
    """The group of commands; asks entry points of `condmod.commands` for what it lacks."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands, ours first."""
        return [*super().list_commands(ctx), *sorted(set(brought()) - set(OWN))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by name; a plugin's is loaded now."""
        own = super().get_command(ctx, cmd_name)
        points = brought().get(cmd_name)
        return own if own is not None or points is None else load_or_tell(cmd_name, points)

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
            points = brought().get(ctx.invoked_subcommand or "", [])
            install = lacking(points[0], error) if points else ""
            if not install:
                raise
            typer.echo(f"error: {install}", err=True)
            raise SystemExit(1) from None


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"condmod {__version__}")
        raise typer.Exit


app = typer.Typer(cls=CommandGroup, no_args_is_help=True, add_completion=False)
for _function, _name in (
    (components.list_, "list"),
    (components.show, "show"),
    (commands.validate, "validate"),
    (commands.schema, "schema"),
    (commands.doctor, "doctor"),
    (commands.plugins, "plugins"),
    (commands.plan, "plan"),
):
    app.command(_name)(_function)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Say the version.")
    ] = False,
) -> None:
    """Condition any network on any signal, each mechanism chosen by one short string."""
    del version  # its callback has answered


def main() -> None:
    """The console script; a reader that stops reading, as `head` does, ends it quietly."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an equation may hold what a locale lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit("error: the output cannot be written: no space left")
    finally:
        _close_quietly()


def _close_quietly() -> None:
    """Flush what is left; where nobody reads any more, let Python's own last flush go nowhere."""
    for stream in (sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            assert stream is not None
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
