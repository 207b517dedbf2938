"""Checkpoints: a folder with safetensors and JSON, written aside and renamed; no pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from condmod.errors import CheckpointError

FORMAT = 1
TENSORS = "tensors.safetensors"
DOCUMENT = "checkpoint.json"
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds: tensors by name, and a JSON document."""

    tensors: dict[str, Tensor]
    document: dict[str, Any]


def save_checkpoint(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> None:
    """Write a checkpoint beside `folder`, then rename it; a checkpoint already there is replaced.

    Args:
        folder: where the checkpoint is to stand.
        tensors: what to keep, by name.
        document: JSON data that belongs to it (config, step, ...); "format" and "tool" are
            added.

    Raises:
        CheckpointError: the document is no JSON, or has another "format" or "tool" of its own.
        OSError: it cannot be written; the checkpoint that stood there still does.
    """
    own = {"format": FORMAT, "tool": "condmod"}
    for key, value in own.items():
        if document.get(key, value) != value:
            raise CheckpointError(
                f"the key {key!r} of a checkpoint's document is condmod's own; "
                f"got {document[key]!r}"
            )
    try:
        text = json.dumps({**own, **document}, indent=2, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"a checkpoint's document is plain JSON data: {error}") from None
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    aside, former = target.with_name(f".{target.name}.new"), _former(target)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        _write_tensors(tensors, aside / TENSORS)
        (aside / DOCUMENT).write_text(text + "\n", encoding="utf-8")
        shutil.copymode(aside / DOCUMENT, aside / TENSORS)  # safetensors writes for the owner alone
        for path in (aside / TENSORS, aside / DOCUMENT, aside):
            _sync(path)
        if target.exists():
            shutil.rmtree(former, ignore_errors=True)  # the target stands and is newer
            target.rename(former)
        aside.rename(target)
        _sync(target.parent)
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk in a write or sync names no file
            error.filename = str(target)
        raise
    finally:
        _recover(target)
        shutil.rmtree(aside, ignore_errors=True)


def load_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: it is missing, truncated, foreign, or of another format version.
    """
    target = Path(folder)
    for _ in range(_TRIES):  # where a save replaces it meanwhile
        path = target if target.exists() else _former(target)
        try:
            found = _load(path)
            if (path / DOCUMENT).stat().st_ino == found[0]:
                return found[1]
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise CheckpointError(
        f"{target} holds no condmod checkpoint: it needs {DOCUMENT} and {TENSORS}"
    )


def _load(path: Path) -> tuple[int, Checkpoint]:
    """A checkpoint, and what tells its document from one that has taken its place."""
    mark = (path / DOCUMENT).stat().st_ino
    try:
        document = json.loads((path / DOCUMENT).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / DOCUMENT} is not readable JSON: {error}") from None
    if not isinstance(document, dict) or document.get("tool") != "condmod":
        raise CheckpointError(f"{path / DOCUMENT} was not written by condmod")
    if document.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {document.get('format')!r}; this condmod reads {FORMAT}"
        )
    try:
        tensors = load((path / TENSORS).read_bytes())
    except SafetensorError as error:
        raise CheckpointError(f"{path / TENSORS} is truncated or foreign: {error}") from None
    return mark, Checkpoint(tensors, document)


def load_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module after checking every key, shape and dtype.

    Raises:
        CheckpointError: what is missing, unexpected or of another shape or dtype; the module
            is left as it was.
    """
    state = module.state_dict()
    problems = [f"missing {name}" for name in state if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in state]
    for name in state.keys() & tensors.keys():
        want, got = state[name], tensors[name]
        if want.is_meta:  # copying into it would be silently nothing
            problems.append(f"{name} is on the meta device; call to_empty(device=...) first")
        elif want.shape != got.shape or want.dtype != got.dtype:
            problems.append(
                f"{name} is {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
            )
    if problems:
        shown = "; ".join(sorted(problems)[:8])
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"the checkpoint does not fit the module: {shown}{more}")
    module.load_state_dict(dict(tensors), strict=True)


def _former(target: Path) -> Path:
    """Where the checkpoint before this one stands while a save replaces it."""
    return target.with_name(f".{target.name}.old")


def _recover(target: Path) -> None:
    """Put the former checkpoint back where a save was cut off between its two renames."""
    if _former(target).is_dir() and not target.exists():
        _former(target).rename(target)


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(_plain(tensors), path)
    except SafetensorError as error:  # how safetensors tells of a full disk
        raise OSError(f"cannot write {path}: {error}") from None


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them; tied ones are copied."""
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().contiguous()
        storage = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if storage in storages else own
        storages.add(storage)
    return plain


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
