"""What the commands share: JSON for programs, tables for people."""

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")]


def print_json(data: Any) -> None:
    """Print plain data."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; a terminal gets a title row in bold."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    title = "  ".join(word.ljust(width) for word, width in zip(head, widths, strict=True))
    typer.secho(title.rstrip(), bold=sys.stdout.isatty())
    for row in rows:
        line = "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())
