"""The journal of a run: metrics.jsonl, one line every few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from condmod_lab.writing import save_text


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line; it is with the operating system when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal, up to one that a kill has torn."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


def cut(path: Path, step: int) -> None:
    """Forget every line after a step, for a run that goes on from there."""
    kept = [line for line in read(path) if line["step"] <= step]
    save_text(path, "".join(json.dumps(line) + "\n" for line in kept))
