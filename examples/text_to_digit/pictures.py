"""The figures: captions beside what was drawn by them, and what the numbers say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from condmod_lab.report import sheet

INK, FAINT, ACCENT, SECOND = "#1b1f24", "#9aa4af", "#0b6e99", "#c2571a"


def draw_rows(path: Path, rows: Mapping[str, Tensor], title: str) -> None:
    """A row per caption, its pictures (B, 1, H, W) on the right of it."""
    columns = max(map(len, rows.values()))
    image = sheet(list(rows.values()), columns, ink=True)
    tall, wide, text = 0.5 * len(rows), 0.5 * columns, 0.067 * max(map(len, rows))
    figure = Figure(figsize=(text + wide + 0.3, tall + 0.5), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()
    axes = figure.add_axes((1 - (wide + 0.05) / width, 0.05 / height, wide / width, tall / height))
    axes.imshow(image, interpolation="nearest", aspect="auto")
    cell = image.shape[0] / len(rows)
    axes.set_xticks([])
    axes.set_yticks([(row + 0.5) * cell - 0.5 for row in range(len(rows))], list(rows))
    axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=INK, pad=6)
    axes.spines[:].set_visible(False)
    figure.text(0.1 / width, 1 - 0.3 / height, title, color=ACCENT, fontsize=11)
    figure.savefig(path)


def draw_numbers(path: Path, results: Mapping[str, Any]) -> None:
    """Share of digits read right, by guidance and by what is new of a caption.

    Args:
        path: the PNG to write.
        results: of run.py; the bars are means over its seeds.
    """
    sweep, seeds = results["sweep"], list(results["seeds"].values())
    ceiling = seeds[0]["pretrained"]["quality"]["classifier_accuracy"]
    figure = Figure(figsize=(10.5, 3.9), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    at = [point["guidance"] for point in sweep]
    left.axhline(ceiling, color=FAINT, linewidth=1, linestyle="--")
    left.text(at[-1], ceiling + 0.012, "real digits", color=FAINT, fontsize=9, ha="right")
    left.axhline(0.1, color=FAINT, linewidth=1, linestyle=":")
    left.text(at[-1], 0.03, "chance", color=FAINT, fontsize=9, ha="right")
    for name, colour in (("own", ACCENT), ("shuffled", SECOND)):
        shares = [point[name] for point in sweep]
        left.plot(at, shares, color=colour, marker="o", label=f"{name} captions")
    left.set_xlabel("guidance (0: no text, 1: plain)")
    left.set_title("Digits read right, held-out captions", color=INK, loc="left", fontsize=11)
    left.legend(frameon=False, loc="center right")
    groups = list(seeds[0]["pretrained"]["own"])
    for shift, (name, colour) in enumerate((("pretrained", ACCENT), ("random", FAINT))):
        shares = [fmean(seed[name]["own"][group]["digit"] for seed in seeds) for group in groups]
        places = [place + 0.4 * shift - 0.2 for place in range(len(groups))]
        bars = right.bar(places, shares, 0.36, color=colour, label=f"{name} MiniLM")
        right.bar_label(bars, [f"{share:.2f}" for share in shares], fontsize=8, color=INK)
    right.axhline(0.1, color=FAINT, linewidth=1, linestyle=":")
    right.set_xticks(range(len(groups)), groups, fontsize=9)
    right.set_title("The same, by what is new of a caption", color=INK, loc="left", fontsize=11)
    right.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    for axes in (left, right):
        axes.set_ylim(0, 1.08)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
