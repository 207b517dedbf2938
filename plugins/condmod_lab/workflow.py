"""A whole run from config to pictures, and samples from a finished one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from condmod import ConditionError
from condmod_lab import report
from condmod_lab.backbone import DigitNet
from condmod_lab.config import SamplingConfig, TrainConfig
from condmod_lab.data import CLASSES, SIDE, Split, load_digits
from condmod_lab.flow import draw
from condmod_lab.metrics import Judge
from condmod_lab.run_folder import RunFolder, save_images, save_json, writing
from condmod_lab.training import make_accelerator, train

_CHUNK = 1000


def run(config: TrainConfig, console: Console, *, overwrite: bool = False) -> dict[str, Any]:
    """Train, draw samples, measure them, and leave everything in the run folder.

    Args:
        config: the run.
        console: where progress goes.
        overwrite: whether a former run in the folder may be replaced.

    Returns:
        What metrics.json holds; empty in every process but the main one.

    Raises:
        CondmodError: what is wrong; nothing that was there before is lost.
    """
    split, folder, accelerator = load_digits(), RunFolder(Path(config.output)), make_accelerator()
    started = time.monotonic()
    net = train(config, split.train, folder, accelerator, console, overwrite=overwrite)
    train_seconds = time.monotonic() - started
    if not accelerator.is_main_process:
        return {}
    console.print(f"drawing {config.sampling.samples} samples, with and without a label")
    labels = torch.arange(config.sampling.samples) % CLASSES
    started = time.monotonic()
    images = draw_digits(net, labels, config.sampling, seed=config.seed)
    sample_seconds = time.monotonic() - started
    null = draw_digits(net, labels, config.sampling, seed=config.seed, present=False)
    judge = Judge(split)
    metrics = {
        **judge.measure(images, labels),
        "null_accuracy": judge.accuracy(null, labels),
        "num_samples": len(images),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "train_seconds": round(train_seconds, 1),
        "sample_seconds": round(sample_seconds, 1),
        "modulator": str(config.modulator),
    }
    save_json(folder.path / "metrics.json", metrics)
    save_images(folder.path / "samples.safetensors", images, labels)
    with writing(folder.path):
        _draw_report(folder, split, images, labels, metrics)
    return metrics


def _draw_report(
    folder: RunFolder, split: Split, images: Tensor, labels: Tensor, metrics: dict[str, Any]
) -> None:
    report.draw_samples(
        folder.path / "samples.png",
        [images[labels == label] for label in range(CLASSES)],
        [split.held_out.of_class(label) for label in range(CLASSES)],
        f"conditioned by {metrics['modulator']}; the first drawn of each class, none chosen; "
        f"{metrics['conditional_accuracy']:.1%} of {len(images)} are read as asked",
    )
    report.draw_loss(folder.path / "loss.png", folder.log)


def draw_digits(
    net: DigitNet, labels: Tensor, sampling: SamplingConfig, *, seed: int, present: bool = True
) -> Tensor:
    """Draw one digit for each label (B,), with the noise of `seed`; (B, 1, 8, 8) on the CPU.

    Args:
        net: a trained network.
        labels: (B,), the class of each digit.
        sampling: how to draw.
        seed: decides the noise.
        present: False draws under the null condition, whatever the labels say.
    """
    device = next(net.parameters()).device
    noise = torch.randn(len(labels), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    drawn = [
        draw(
            net,
            some_noise.to(device),
            some_labels.to(device),
            present=torch.full_like(some_labels, present, dtype=torch.bool, device=device),
            steps=sampling.steps,
            guidance=sampling.guidance,
        )
        for some_noise, some_labels in zip(
            torch.split(noise, _CHUNK), torch.split(labels, _CHUNK), strict=True
        )
    ]
    return torch.cat(drawn).cpu()


@dataclass(frozen=True, slots=True)
class Drawn:
    """Where the digits of one label went, and how many of them the classifier reads as it."""

    picture: Path
    tensors: Path
    count: int
    read_as_label: float


def sample(
    folder: RunFolder,
    label: int,
    *,
    count: int,
    seed: int,
    guidance: float | None = None,
) -> Drawn:
    """Draw digits of one label from a finished run, into its folder `drawn`.

    Args:
        folder: the run.
        label: the class to draw.
        count: how many digits.
        seed: decides the noise.
        guidance: in place of the run's own.

    Raises:
        ConditionError: the label is no class.
        CheckpointError: the run's checkpoint is missing, truncated or foreign.
        RunFolderError: the pictures cannot be written.
    """
    if not 0 <= label < CLASSES:
        raise ConditionError(f"a label is from 0 to {CLASSES - 1}; got {label}")
    trained = folder.load()
    sampling = trained.config.sampling
    if guidance is not None:
        sampling = sampling.model_copy(update={"guidance": guidance})
    labels = torch.full((count,), label)
    images = draw_digits(trained.net, labels, sampling, seed=seed)
    picture = folder.drawn(f"label-{label}.png")
    tensors = picture.with_suffix(".safetensors")
    with writing(picture):
        report.draw_grid(picture, images, f"{label} as drawn by {folder.path.name}")
    save_images(tensors, images, labels)
    accuracy = Judge(load_digits()).accuracy(images, labels)
    return Drawn(picture, tensors, count, accuracy)
