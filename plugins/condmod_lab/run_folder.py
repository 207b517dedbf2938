"""The run folder: where a run's results stand, and what may be overwritten."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from condmod import CheckpointError, SpecError
from condmod.serialization import load_checkpoint, load_state, save_checkpoint
from condmod_lab.backbone import DigitNet, build
from condmod_lab.config import TrainConfig, load_config, make_config
from condmod_lab.errors import RunFolderError, RunFolderExistsError

KIND: Final = "condmod_lab.digits"
_OURS: Final = frozenset(
    {
        "checkpoint",
        "config.yaml",
        "drawn",
        "loss.png",
        "metrics.json",
        "metrics.jsonl",
        "samples.png",
        "samples.safetensors",
    }
)
_UNFINISHED: Final = (".checkpoint.", ".config.yaml.")


@dataclass(frozen=True, slots=True)
class Trained:
    """What a checkpoint gives back."""

    net: DigitNet
    config: TrainConfig
    step: int


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The folder of the last checkpoint."""
        return self.path / "checkpoint"

    @property
    def log(self) -> Path:
        """One JSON line per logged step."""
        return self.path / "metrics.jsonl"

    def drawn(self, name: str) -> Path:
        """The path of a file in the folder `drawn`, where `condmod sample` writes.

        Raises:
            RunFolderError: the folder cannot be written.
        """
        drawn = self.path / "drawn"
        try:
            drawn.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=drawn):
                return drawn / name
        except OSError as error:
            raise RunFolderError(f"cannot write into {drawn}: {error.strerror}") from None

    def claim(self, config: TrainConfig, *, overwrite: bool) -> None:
        """Make the folder, empty of results, and write the resolved config into it.

        With `overwrite` a former run is removed, but never a folder that holds anything else.

        Raises:
            RunFolderExistsError: the folder holds something that may not be overwritten.
            RunFolderError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            entries = list(self.path.iterdir())
            if entries:
                self._check_overwrite(overwrite)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            for entry in entries:
                _remove(entry)
            aside = self.path / ".config.yaml.new"  # never an empty config that nobody owns
            aside.write_text(config.to_yaml(), encoding="utf-8")
            aside.replace(self.path / "config.yaml")
        except RunFolderError:
            raise
        except FileExistsError:
            raise RunFolderExistsError(
                f"{self.path} is a file; name another folder with --output"
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"cannot write the run folder {self.path}: {error.strerror}; "
                "name another one with --output"
            ) from None

    def _check_overwrite(self, overwrite: bool) -> None:
        foreign = sorted(
            entry.name
            for entry in self.path.iterdir()
            if entry.name not in _OURS and not entry.name.startswith(_UNFINISHED)
        )
        if foreign:
            raise RunFolderExistsError(
                f"{self.path} holds what no run wrote ({', '.join(foreign[:3])}), so it is never "
                "overwritten; name another folder with --output"
            )
        try:
            load_config(self.path / "config.yaml")
        except SpecError:
            if not (self.checkpoint / "checkpoint.json").is_file():
                raise RunFolderExistsError(
                    f"{self.path} is not empty and holds no config or checkpoint of a run, so it "
                    "is never overwritten; name another folder with --output"
                ) from None
        if not overwrite:
            raise RunFolderExistsError(
                f"{self.path} holds a run already; add --overwrite to replace it, "
                "or name another folder with --output"
            )

    def save(self, net: DigitNet, config: TrainConfig, step: int) -> None:
        """Write a checkpoint of the network in place of the last one."""
        document = {"kind": KIND, "step": step, "config": config.model_dump(mode="json")}
        with writing(self.checkpoint):
            save_checkpoint(self.checkpoint, net.state_dict(), document)

    def _compare(self, config: TrainConfig, tensors: Mapping[str, Tensor]) -> None:
        """Refuse tensors that are not the config's, before that network takes any memory."""
        with torch.device("meta"):
            wanted = DigitNet(config).state_dict()
        shapes = {name: tuple(value.shape) for name, value in wanted.items()}
        wrong = sorted(
            name
            for name in shapes.keys() | tensors.keys()
            if name not in tensors or shapes.get(name) != tuple(tensors[name].shape)
        )
        if wrong:
            raise CheckpointError(
                f"{self.checkpoint} does not fit its own config: {len(wrong)} tensors are missing, "
                f"unexpected or of another shape, such as {wrong[0]}"
            )

    def load(self) -> Trained:
        """Read the last checkpoint.

        Raises:
            CheckpointError: it is missing, truncated, foreign, or does not fit its config.
        """
        found = load_checkpoint(self.checkpoint)
        if found.document.get("kind") != KIND:
            raise CheckpointError(
                f"{self.checkpoint} is no checkpoint of `condmod train` or `condmod demo`: "
                f"its kind is {found.document.get('kind')!r}"
            )
        try:
            config, step = make_config(found.document["config"]), int(found.document["step"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{self.checkpoint} holds no readable config and step: "
                f"{type(error).__name__}: {error}"
            ) from None
        self._compare(config, found.tensors)
        net = build(config)
        load_state(net, found.tensors)
        return Trained(net, config, step)


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
    """Write a document for people and programs to read."""
    with writing(path):
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def save_images(path: Path, images: Tensor, labels: Tensor) -> None:
    """Write images (B, 1, 8, 8) from -1 to 1 with their labels (B,)."""
    with writing(path):
        aside = path.with_name(f".{path.name}.new")  # whoever has the old file mapped keeps it
        aside.write_bytes(save({"images": images.contiguous(), "labels": labels.contiguous()}))
        aside.replace(path)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()
