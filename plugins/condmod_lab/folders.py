"""Folders that a run writes into: made, locked, and never overwritten where they hold more."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from condmod_lab.errors import RunFolderError, RunFolderExistsError
from condmod_lab.writing import writing

LOCK = ".lock"
_LITTER = frozenset({LOCK, ".DS_Store", "Thumbs.db", "desktop.ini"})


def make(path: Path) -> None:
    """Make a folder, and see that it can be written.

    Raises:
        RunFolderError: it cannot, or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        raise RunFolderExistsError(f"{path} is a file; name another folder with --output") from None
    except OSError as error:
        raise RunFolderError(
            f"cannot write the run folder {path}: {error.strerror}; name another one with --output"
        ) from None


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Keep everybody else out of a folder; a kill lets go of it.

    Raises:
        RunFolderError: somebody else is in the folder, or it cannot be written.
    """
    make(path)
    held = FileLock(path / LOCK, timeout=0)
    with writing(path):
        try:
            held.acquire()
        except Timeout:
            raise RunFolderError(
                f"another run is writing into {path}; wait for its end, "
                "or name another folder with --output"
            ) from None
    try:
        yield
    finally:
        held.release()


def entries(path: Path) -> list[Path]:
    """What a folder holds beside its lock and what file managers leave; nothing without a folder.

    Raises:
        RunFolderError: the folder cannot be read.
    """
    if not os.path.isdir(path):  # where Path.is_dir raises for names that are too long
        return []
    try:
        return sorted(entry for entry in path.iterdir() if entry.name not in _LITTER)
    except OSError as error:
        raise RunFolderError(
            f"cannot read the run folder {path}: {error.strerror}; name another one with --output"
        ) from None


def begun(path: Path, unfinished: tuple[str, ...]) -> bool:
    """Whether a folder holds more than what a kill may have left of a first write."""
    return any(not entry.name.startswith(unfinished) for entry in entries(path))


def refuse_foreign(path: Path, ours: Collection[str], unfinished: tuple[str, ...]) -> None:
    """Refuse a folder that holds anything whose name is not ours.

    Raises:
        RunFolderExistsError: names what it holds.
    """
    names = [entry.name for entry in entries(path)]
    refuse(path, [name for name in names if name not in ours and not name.startswith(unfinished)])


def refuse(path: Path, foreign: Sequence[str]) -> None:
    """Refuse a folder that holds anything foreign, told by its names.

    Raises:
        RunFolderExistsError: there is any.
    """
    if foreign:
        raise RunFolderExistsError(
            f"{path} holds what no run wrote ({', '.join(foreign[:3])}), so it is never "
            "overwritten; name another folder with --output"
        )
