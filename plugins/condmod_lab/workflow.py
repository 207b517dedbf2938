"""A whole run from config to pictures, and samples from a finished one."""

from __future__ import annotations

import difflib
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor

from condmod import ConditionError
from condmod_lab import folders, journal, report
from condmod_lab.config import TrainConfig
from condmod_lab.data import Images, Split, load_data
from condmod_lab.errors import DataError
from condmod_lab.flow import draw, flow_errors
from condmod_lab.launch import make_accelerator
from condmod_lab.metrics import Judge, summarise
from condmod_lab.network import Network
from condmod_lab.order import held_out_draws
from condmod_lab.progress import tell
from condmod_lab.run_folder import Into, RunFolder, facts_of
from condmod_lab.scheduling import schedule_of, scheduled
from condmod_lab.sections import SamplingConfig
from condmod_lab.state import trained
from condmod_lab.training import check_batch, train
from condmod_lab.writing import save_json, save_tensors, writing

_CHUNK: Final = 1000
_TIMES: Final = 8
_HELD_OUT: Final = 2000


def run(config: TrainConfig, console: Console, *, into: Into = "new") -> dict[str, Any]:
    """Train, draw samples, measure them, and leave everything in the run folder.

    Args:
        config: the run.
        console: where progress goes.
        into: what may happen to a former run in the folder; a finished one that is to go on is
            left as it is.

    Returns:
        What metrics.json holds; empty in every process but the main one.

    Raises:
        CondmodError: what is wrong; nothing that was there before is lost.
    """
    split, folder = load_data(config.data), RunFolder(Path(config.output))
    config = prepare(config, split)
    accelerator = make_accelerator(config, folder.path)
    if into == "resume" and (finished := folder.metrics()):
        accelerator.end_training()
        if not accelerator.is_main_process:
            return {}
        folder.check(config, into)
        folder.resume(config, facts_of(split))
        tell(console, f"the run in {folder.path} is finished")
        return finished
    if accelerator.is_main_process:
        folder.check(config, into)
        tell_skipped(console, split)
    else:
        console = Console(quiet=True)
    with folders.lock(folder.path) if accelerator.is_main_process else nullcontext():
        net = train(config, split, folder, accelerator, console, into=into)
        metrics = (
            _measure(config, net, split, folder, console) if (accelerator.is_main_process) else {}
        )
        accelerator.log({key: value for key, value in metrics.items() if key != "modulator"})
        accelerator.end_training()
    return metrics


def prepare(config: TrainConfig, split: Split) -> TrainConfig:
    """The config with all that depends on the data spelled out.

    Raises:
        ConfigError: there are too few samples to measure, or too few images for a batch.
        DataError: the images are too much alike to measure by.
    """
    Judge(split).check(_labels(config, split))
    check_batch(config, split)
    return config.resolve(len(split.classes))


def _labels(config: TrainConfig, split: Split) -> Int[Tensor, " B"]:
    """The classes in turn, one for each sample that a run is measured on."""
    return torch.arange(config.sampling.samples) % len(split.classes)


def tell_skipped(console: Console, split: Split) -> None:
    """List the pictures that were left out."""
    for line in split.skipped:
        tell(console, f"left out: {line}")


def _measure(
    config: TrainConfig, net: Network, split: Split, folder: RunFolder, console: Console
) -> dict[str, Any]:
    """Draw samples, measure them, and write figures and pictures."""
    sampling, seed = config.sampling, config.seed
    console.print(f"drawing {sampling.samples} samples, with and without a label")
    labels = _labels(config, split)
    started = time.monotonic()
    images = draw_images(net, labels, split.shape, sampling, seed=seed)
    sample_seconds = time.monotonic() - started
    null = draw_images(net, labels, split.shape, sampling, seed=seed, present=False)
    judge = Judge(split)
    items = {
        "held_out_loss": held_out_errors(net, split.held_out, seed),
        **judge.each(images, labels),
    }
    metrics = {
        **{name: summarise(name, values) for name, values in items.items()},
        "classifier_accuracy": judge.ceiling,
        "null_accuracy": judge.accuracy(null, labels),
        "num_samples": len(images),
        "parameters": sum(parameter.numel() for parameter in trained(net).values()),
        **_pace(journal.read(folder.log)),
        "sample_seconds": round(sample_seconds, 3),
        "modulator": str(config.modulator),
    }
    save_tensors(folder.path / "samples.safetensors", {"images": images, "labels": labels})
    save_tensors(folder.path / "measures.safetensors", items)
    with writing(folder.path):
        _draw_report(folder, split, images, labels, metrics)
    save_json(folder.figures, metrics)  # at the end, for it says that the run is finished
    return metrics


def _pace(lines: list[dict[str, Any]]) -> dict[str, float]:
    """How long training took, and the median time of a step."""
    paces = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in pairwise([{"step": 0, "seconds": 0.0}, *lines])
    ]
    return {
        "train_seconds": round(lines[-1]["seconds"], 1),
        "step_seconds": round(median(paces), 6),
    }


def _draw_report(
    folder: RunFolder, split: Split, images: Tensor, labels: Tensor, metrics: dict[str, Any]
) -> None:
    report.draw_samples(
        folder.path / "samples.png",
        images,
        labels,
        split,
        f"conditioned by {metrics['modulator']}; the first drawn of each class, none chosen; "
        f"{metrics['conditional_accuracy']:.1%} of {len(images)} are read as asked",
    )
    report.draw_loss(folder.path / "loss.png", journal.read(folder.log))


@torch.no_grad()
def held_out_errors(net: Network, held_out: Images, seed: int) -> Float[Tensor, " N"]:
    """The flow's loss on each held-out image, the mean over times from 0 to 1.

    Args:
        net: a trained network, in eval mode.
        held_out: what it has not learned from; the first 2,000 images are used.
        seed: decides noise and times, so that two networks meet the same.
    """
    device = next(net.parameters()).device
    images, labels = held_out.images[:_HELD_OUT].to(device), held_out.labels[:_HELD_OUT].to(device)
    _, channels, height, width = images.shape
    draws = held_out_draws(seed, len(images), (channels, height, width), _TIMES)
    return torch.stack([flow_errors(net, images, labels, some) for some in draws]).mean(0).cpu()


def draw_images(
    net: Network,
    labels: Int[Tensor, " B"],
    shape: tuple[int, int, int],
    sampling: SamplingConfig,
    *,
    seed: int,
    present: bool = True,
) -> Float[Tensor, "B C H W"]:
    """Draw one image for each label, with the noise of `seed`; on the CPU.

    Where that is less work, all modulations are generated first, once for each step and class.

    Args:
        net: a trained network.
        labels: (B,), the class of each image.
        shape: (C, H, W).
        sampling: how to draw.
        seed: decides the noise.
        present: False draws under the null condition, whatever the labels say.
    """
    device = next(net.parameters()).device
    start = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(seed))
    noise, labels = start.to(device), labels.to(device)
    table = schedule_of(net, noise, labels, sampling, present=present)
    velocity = net if table is None else scheduled(net, table)
    with table or nullcontext():
        chunks = [
            draw(
                velocity,
                some_noise,
                some_labels,
                present=torch.full_like(some_labels, present, dtype=torch.bool),
                steps=sampling.steps,
                guidance=sampling.guidance,
            )
            for some_noise, some_labels in zip(
                torch.split(noise, _CHUNK), torch.split(labels, _CHUNK), strict=True
            )
        ]
    return torch.cat(chunks).cpu()


@dataclass(frozen=True, slots=True)
class Drawn:
    """Where the images of one label went, and how many of them the classifier reads as it.

    Attributes:
        picture: a PNG of them all.
        tensors: images and labels as safetensors.
        label: the class.
        read_as_label: a share; None where the data that the classifier learns from is gone.
    """

    picture: Path
    tensors: Path
    label: str
    read_as_label: float | None


def sample(
    folder: RunFolder,
    label: str,
    *,
    count: int,
    seed: int,
    guidance: float | None = None,
) -> Drawn:
    """Draw images of one label from a finished run, into its folder `drawn`.

    Args:
        folder: the run.
        label: the class to draw, by its name or its place.
        count: how many images.
        seed: decides the noise.
        guidance: in place of the run's own.

    Raises:
        ConditionError: the label is no class.
        CheckpointError: the run's checkpoint is missing, truncated or foreign.
        RunFolderError: the pictures cannot be written.
    """
    found = folder.load()
    facts, sampling = found.facts, found.config.sampling
    place = _place(label, facts.classes)
    if guidance is not None:
        sampling = sampling.model_copy(update={"guidance": guidance})
    labels = torch.full((count,), place)
    images = draw_images(found.net, labels, facts.shape, sampling, seed=seed)
    name = facts.classes[place]
    picture = folder.drawn(f"label-{_file_name(name)}.png")
    tensors = picture.with_suffix(".safetensors")
    with writing(picture):
        report.draw_grid(picture, images, f"{name} as drawn by {folder.path.name}", ink=facts.ink)
    save_tensors(tensors, {"images": images, "labels": labels})
    try:
        accuracy = Judge(load_data(found.config.data)).accuracy(images, labels)
    except DataError:
        accuracy = None
    return Drawn(picture, tensors, name, accuracy)


def _place(label: str, classes: tuple[str, ...]) -> int:
    """The place of a class that is named, or given by its place."""
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    if classes == tuple(map(str, range(len(classes)))):
        raise ConditionError(f"a label is from 0 to {len(classes) - 1}; got {label}")
    close = difflib.get_close_matches(label, classes, n=1)
    mend = f"; did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(map(repr, classes[:10])) + (", ..." if len(classes) > 10 else "")
    raise ConditionError(f"a label is one of {shown}; got {label!r}{mend}")


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)[:60]
