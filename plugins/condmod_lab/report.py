"""The pictures of a run: samples beside real digits, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from condmod_lab.data import Split

ROWS: Final = 20
_INCHES: Final = 0.8  # of an image
_TITLE_INCHES: Final = 0.45
_PAPER: Final = 2.25  # so that -1 is a gray of 8/9, told from the white between
_INK: Final = "#1b1f24"
_FAINT: Final = "#9aa4af"
_ACCENT: Final = "#0b6e99"


def draw_samples(path: Path, samples: Tensor, labels: Tensor, split: Split, caption: str) -> None:
    """A row per class: its samples on the left, real images of the class on the right.

    Args:
        path: the PNG to write.
        samples: (B, C, H, W), from -1 to 1.
        labels: (B,), the class that each was asked to show; the first classes are drawn.
        split: where the real images come from, held out.
        caption: one line below.
    """
    shown = range(min(len(split.classes), ROWS))
    left = sheet([samples[labels == label] for label in shown], 14, ink=split.ink)
    right = sheet([split.held_out.of_class(label) for label in shown], 7, ink=split.ink)
    tall = 1.1 + 0.5 * len(shown)
    figure = Figure(figsize=(11.5, tall), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    sides = figure.subplots(
        1, 2, width_ratios=(left.shape[1], right.shape[1]), gridspec_kw={"wspace": 0.05}
    )
    for axes, image, title in zip(
        sides, (left, right), ("drawn by the network", "real, held out"), strict=True
    ):
        _show(axes, image)
        axes.set_title(title, color=_INK, fontsize=12, pad=8)
    cell = left.shape[0] / len(shown)
    sides[0].set_yticks(
        [(row + 0.5) * cell - 0.5 for row in shown], [split.classes[row][:16] for row in shown]
    )
    sides[0].tick_params(axis="y", length=0, labelsize=13, labelcolor=_ACCENT, pad=8)
    longest = max(len(split.classes[row][:16]) for row in shown)
    figure.subplots_adjust(
        left=0.03 + 0.01 * longest, right=0.99, top=1 - 0.43 / tall, bottom=0.37 / tall
    )
    figure.text(0.02, 0.12 / tall, caption, color=_FAINT, fontsize=9)
    figure.savefig(path)


def draw_grid(path: Path, images: Tensor, title: str, *, ink: bool) -> None:
    """Images (B, C, H, W) in a grid of at most ten columns; `ink` as of `Split`."""
    columns = min(10, len(images))
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    height, width = len(rows) * _INCHES, columns * _INCHES
    whole = height + _TITLE_INCHES
    figure = Figure(figsize=(max(width, 3), whole), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, height / whole))
    _show(axes, sheet(rows, columns, ink=ink))
    axes.set_title(title, color=_INK, fontsize=12, pad=6)
    figure.savefig(path)


def draw_loss(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """The loss over the steps, as logged and smoothed.

    Args:
        path: the PNG to write.
        lines: a run's journal.
    """
    steps = [line["step"] for line in lines]
    losses = [line["loss"] for line in lines]
    figure = Figure(figsize=(8, 4.2), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, losses, color=_FAINT, linewidth=0.8, alpha=0.7, label="as logged")
    axes.plot(steps, _smooth(losses), color=_ACCENT, linewidth=2, label="smoothed")
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks("{x:g}")
    axes.set_xlabel("training step")
    axes.set_ylabel("velocity error (mean squared)")
    axes.set_title("Loss of the flow", color=_INK, loc="left")
    axes.grid(visible=True, which="both", color="#e6e9ec", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def sheet(rows: Sequence[Tensor], columns: int, *, ink: bool) -> Any:
    """Rows of images side by side on white, an array (height, width, 3) from 0 to 1.

    Args:
        rows: each (B, C, H, W) with C 1 or 3, from -1 to 1; the first `columns` are shown.
        columns: how wide the sheet is, in images.
        ink: whether 1 is black on a paper of light gray; else 1 is white.
    """
    height, width = rows[0].shape[-2:]
    gap = max(1, width // 4) if ink else max(1, width // 16)
    shape = (len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3)
    paper = torch.ones(shape)
    for place, row in enumerate(rows):
        for column, image in enumerate(row[:columns]):
            top, left = place * (height + gap) + gap, column * (width + gap) + gap
            light = (1 - image) / _PAPER if ink else (1 + image) / 2
            paper[top : top + height, left : left + width] = light.permute(1, 2, 0)
    return paper.clamp(0, 1).numpy()


def _show(axes: Axes, image: Any) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over about a twentieth of the run, over less near its ends."""
    widest = max(1, len(values) // 40)
    smooth = []
    for place in range(len(values)):
        half = min(widest, place, len(values) - 1 - place)
        smooth.append(fmean(values[place - half : place + half + 1]))
    return smooth
