"""What the commands share: JSON for programs, tables for people."""

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from condmod.tables import text_table

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")]


def print_json(data: Any) -> None:
    """Print plain data."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; a terminal gets a title row in bold."""
    title, *lines = text_table(head, rows)
    typer.secho(title, bold=sys.stdout.isatty())
    for line in lines:
        typer.echo(line)
