"""The run folder: where a run's results stand, who may write into it, what may be overwritten."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from condmod import CheckpointError, SpecError
from condmod.serialization import Checkpoint, load_checkpoint, load_state, save_checkpoint
from condmod_lab import folders
from condmod_lab.config import TrainConfig, differences, load_config, make_config
from condmod_lab.data import Split
from condmod_lab.errors import RunFolderError, RunFolderExistsError
from condmod_lab.network import Network, build
from condmod_lab.state import AVERAGE, within
from condmod_lab.writing import remove, save_text, writing

KIND: Final = "condmod_lab.run"
Into: TypeAlias = Literal["new", "overwrite", "resume"]
"""What may happen to a run that a folder holds already: nothing, to be replaced, to go on."""
_OURS: Final = frozenset(
    {
        "checkpoint",
        "config.yaml",
        "drawn",
        "loss.png",
        "measures.safetensors",
        "metrics.json",
        "metrics.jsonl",
        "samples.png",
        "samples.safetensors",
        "tracking",
    }
)
_UNFINISHED: Final = (".checkpoint.", ".config.yaml.", ".measures.", ".metrics.", ".samples.")


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What a network must know of the data it was trained on.

    Attributes:
        classes: what the labels mean, in order.
        shape: (C, H, W) of an image.
        ink: whether 1 is ink on paper.
        fingerprint: of the images and labels.
    """

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    ink: bool
    fingerprint: str


def facts_of(split: Split) -> DataFacts:
    """What a network learned from, told from all other data."""
    return DataFacts(split.classes, split.shape, split.ink, split.fingerprint)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a checkpoint gives back: a network with averaged weights, and where it comes from."""

    net: Network
    config: TrainConfig
    step: int
    facts: DataFacts


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The folder of the last checkpoint."""
        return self.path / "checkpoint"

    @property
    def config(self) -> Path:
        """The resolved config; written first."""
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        """One JSON line per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def figures(self) -> Path:
        """What a run has come to; written last, so that a run with it is finished."""
        return self.path / "metrics.json"

    def metrics(self) -> dict[str, Any]:
        """What `figures` holds; empty where the run is not finished.

        Raises:
            RunFolderError: the file is not what a run writes.
        """
        if not os.path.isfile(self.figures):  # where Path.is_file raises for names too long
            return {}
        try:
            found = json.loads(self.figures.read_text(encoding="utf-8"))
            if isinstance(found, dict) and found:
                return found
            what = f"holds no figures of a run but {found!r:.40}"
        except (ValueError, OSError) as error:
            what = f"is not readable JSON: {error}"
        raise RunFolderError(f"{self.figures} {what}; remove it and go on with --resume")

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

    def check(self, config: TrainConfig, into: Into) -> None:
        """See whether a run may enter the folder; nothing is touched.

        Args:
            config: the run, resolved.
            into: what may happen to a former run.

        Raises:
            RunFolderExistsError: the folder holds something that may not be overwritten.
            RunFolderError: the run to go on with has another config; shows what differs.
        """
        if not folders.begun(self.path, _UNFINISHED):
            return
        former = self._former_config()
        if into == "new":
            raise RunFolderExistsError(
                f"{self.path} holds a run already; add --resume to go on with it, --overwrite to "
                "replace it, or name another folder with --output"
            )
        if into == "resume":
            if former is None:
                raise RunFolderError(
                    f"{self.config} cannot be read, so the run cannot go on; "
                    "add --overwrite to replace it"
                )
            self._refuse_another(config, former)

    def claim(self, config: TrainConfig, into: Into) -> None:
        """Make the folder ready for a run, with the resolved config in it.

        With "overwrite" a former run is removed, but never a folder that holds anything else.

        Raises:
            RunFolderExistsError, RunFolderError: as `check`, or the folder cannot be written.
        """
        self.check(config, into)
        folders.make(self.path)
        if into == "resume" and folders.begun(self.path, _UNFINISHED):
            return
        with writing(self.path):  # the config last, for by it a folder is known as a run's
            self.figures.unlink(missing_ok=True)  # by them a run is known as finished
            for entry in sorted(folders.entries(self.path), key=lambda each: each == self.config):
                remove(entry)
        save_text(self.config, config.to_yaml())

    def _former_config(self) -> TrainConfig | None:
        """The config of the run that the folder holds, None where only its checkpoint is whole.

        Raises:
            RunFolderExistsError: the folder holds anything but a run.
        """
        folders.refuse_foreign(self.path, _OURS, _UNFINISHED)
        try:
            return load_config(self.config)
        except SpecError:
            if not (self.checkpoint / "checkpoint.json").is_file():
                raise RunFolderExistsError(
                    f"{self.path} is not empty and holds no config or checkpoint of a run, so it "
                    "is never overwritten; name another folder with --output"
                ) from None
        return None

    def _refuse_another(self, config: TrainConfig, former: TrainConfig) -> None:
        if changed := differences(config, former):
            raise RunFolderError(
                f"{self.path} holds a run of another config, so it cannot go on with this one; "
                "it has\n" + "\n".join(changed) + "\ngive the same config, add --overwrite to "
                "replace the run, or name another folder with --output"
            )

    def save(
        self,
        tensors: Mapping[str, Tensor],
        config: TrainConfig,
        facts: DataFacts,
        step: int,
        training: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint in place of the last one.

        Args:
            tensors: averaged weights, and what training needs to go on.
            config: the run, resolved.
            facts: the data's classes and shape.
            step: how many steps are done.
            training: what else training needs to go on, as JSON data.
        """
        document = {
            "kind": KIND,
            "step": step,
            "config": config.model_dump(mode="json"),
            "data": asdict(facts),
            "training": dict(training),
        }
        with writing(self.checkpoint):
            save_checkpoint(self.checkpoint, tensors, document)

    def resume(self, config: TrainConfig, facts: DataFacts) -> Checkpoint | None:
        """The checkpoint to go on from; None where the run has not come to its first one.

        Args:
            config: the run, resolved.
            facts: its data as it is now.

        Raises:
            CheckpointError: it is truncated or foreign.
            RunFolderError: it was written by a run of another config, or on other data; shows what
                differs.
        """
        if not any(self.path.glob("checkpoint")) and not any(self.path.glob(".checkpoint.old")):
            return None
        found, former, _, learned = self._read()
        self._refuse_another(config, former)
        if facts != learned:
            raise RunFolderError(
                f"{self.path} holds a run on other images or labels than the config's data now "
                "has, so it cannot go on; put them back, add --overwrite to replace the run, or "
                "name another folder with --output"
            )
        return found

    def load(self) -> Trained:
        """Read the network of the last checkpoint.

        Raises:
            CheckpointError: it is missing, truncated, foreign, or does not fit its config.
        """
        found, config, step, facts = self._read()
        average = within(found.tensors, AVERAGE)
        self._compare(config, facts, average)
        net = build(config, len(facts.classes), facts.shape)
        load_state(net, average)
        return Trained(net, config, step, facts)

    def _read(self) -> tuple[Checkpoint, TrainConfig, int, DataFacts]:
        found = load_checkpoint(self.checkpoint)
        document = found.document
        if document.get("kind") != KIND:
            raise CheckpointError(
                f"{self.checkpoint} is no checkpoint of `condmod train` or `condmod demo`: "
                f"its kind is {document.get('kind')!r}"
            )
        try:
            data = document["data"]
            channels, height, width = map(int, data["shape"])
            facts = DataFacts(
                tuple(map(str, data["classes"])),
                (channels, height, width),
                bool(data["ink"]),
                str(data["fingerprint"]),
            )
            return found, make_config(document["config"]), int(document["step"]), facts
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{self.checkpoint} holds no readable config, step and data: "
                f"{type(error).__name__}: {error}"
            ) from None

    def _compare(
        self, config: TrainConfig, facts: DataFacts, tensors: Mapping[str, Tensor]
    ) -> None:
        """Refuse tensors that are not the config's, before that network takes any memory."""
        with torch.device("meta"):
            wanted = Network(config, len(facts.classes), facts.shape).state_dict()
        shapes = {name: tuple(value.shape) for name, value in wanted.items()}
        wrong = sorted(
            name
            for name in shapes.keys() | tensors.keys()
            if name not in tensors or shapes.get(name) != tuple(tensors[name].shape)
        )
        if wrong:
            raise CheckpointError(
                f"{self.checkpoint} does not fit its own config: {len(wrong)} tensors are missing, "
                f"unexpected or of another shape, such as {wrong[0]}; a run of another version of "
                "condmod is trained anew with --overwrite"
            )
