"""The pictures of a run: samples beside real digits, and the loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Final

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from condmod_lab.data import CLASSES, SIDE

_GAP: Final = 2
_INCHES_PER_PIXEL: Final = 0.08
_TITLE_INCHES: Final = 0.45
_INK: Final = "#1b1f24"
_FAINT: Final = "#9aa4af"
_ACCENT: Final = "#0b6e99"


def draw_samples(
    path: Path, samples: Sequence[Tensor], real: Sequence[Tensor], caption: str
) -> None:
    """A row per class: its samples on the left, real digits of the class on the right.

    Args:
        path: the PNG to write.
        samples: for each class, (B, 1, 8, 8).
        real: for each class, (B, 1, 8, 8).
        caption: one line below.
    """
    left, right = _sheet(samples, 14), _sheet(real, 7)
    figure = Figure(figsize=(11.5, 6.1), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    sides = figure.subplots(
        1, 2, width_ratios=(left.shape[1], right.shape[1]), gridspec_kw={"wspace": 0.05}
    )
    for axes, sheet, title in zip(
        sides, (left, right), ("drawn by the network", "real, held out"), strict=True
    ):
        _show(axes, sheet)
        axes.set_title(title, color=_INK, fontsize=12, pad=8)
    middles = [row * (SIDE + _GAP) + _GAP + SIDE / 2 - 0.5 for row in range(CLASSES)]
    sides[0].set_yticks(middles, [str(label) for label in range(CLASSES)])
    sides[0].tick_params(axis="y", length=0, labelsize=13, labelcolor=_ACCENT, pad=8)
    figure.subplots_adjust(left=0.04, right=0.99, top=0.93, bottom=0.06)
    figure.text(0.04, 0.02, caption, color=_FAINT, fontsize=9)
    figure.savefig(path)


def draw_grid(path: Path, images: Tensor, title: str) -> None:
    """Images (B, 1, 8, 8) in a grid of at most ten columns."""
    columns = min(10, len(images))
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    sheet = _sheet(rows, columns)
    height, width = (side * _INCHES_PER_PIXEL for side in sheet.shape)
    whole = height + _TITLE_INCHES
    figure = Figure(figsize=(max(width, 3), whole), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, height / whole))
    _show(axes, sheet)
    axes.set_title(title, color=_INK, fontsize=12, pad=6)
    figure.savefig(path)


def draw_loss(path: Path, log: Path) -> None:
    """The loss over the steps, as logged and smoothed.

    Args:
        path: the PNG to write.
        log: a metrics.jsonl.
    """
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
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


def _sheet(rows: Sequence[Tensor], columns: int) -> Tensor:
    """Rows of images side by side with gaps, (height, width); NaN where there is no image."""
    cell = SIDE + _GAP
    sheet = torch.full((len(rows) * cell + _GAP, columns * cell + _GAP), torch.nan)
    for place, row in enumerate(rows):
        for column, image in enumerate(row[:columns, 0]):
            top, left = place * cell + _GAP, column * cell + _GAP
            sheet[top : top + SIDE, left : left + SIDE] = image
    return sheet


def _show(axes: Axes, sheet: Tensor) -> None:
    """Ink on paper: -1 is the paper's colour, 1 black; gaps stay white."""
    axes.set_facecolor("white")
    axes.imshow(sheet.numpy(), cmap="gray_r", vmin=-1.25, vmax=1, interpolation="nearest")
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
