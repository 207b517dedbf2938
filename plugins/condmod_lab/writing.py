"""Files written whole or not at all, and a clear line where the disk does not take them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from condmod_lab.errors import RunFolderError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell what could not be written, and why, as a user's error.

    Raises:
        RunFolderError: in place of any OSError that the body raises.
    """
    try:
        yield
    except RunFolderError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunFolderError(f"cannot write {path}: {reason}") from None


def save_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document for people and programs to read, whole or not at all."""
    save_text(path, json.dumps(document, indent=2) + "\n")


def save_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    _replace(path, text.encode())


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all; who has the old file mapped keeps it."""
    _replace(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            aside.write_bytes(content)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def remove(entry: Path) -> None:
    """Remove a file, a link or a whole folder; links are not followed."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()
