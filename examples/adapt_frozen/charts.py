"""The figures: accuracy by angle and by size, and single digits with what they are read as."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from adaptation import digits, shown, turn
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from condmod_lab.report import sheet

INK, SOFT, RULE = "#1b1f24", "#56606b", "#e6e9ec"
# Told apart where colours are not, too: by dashes here, by marks in the second figure.
LINES: Final = {
    "frozen base, digits turned back": ("#9aa4af", (0, (6, 2))),
    "all weights, told the angle": ("#444c56", (0, (1, 1))),
    "LoRA, rank 2, and FiLM attached": ("#b8478f", "-"),
    "LoRA, rank 4, told the angle": ("#008f6b", (0, (6, 2))),
    "FiLM attached": ("#0072b2", "-"),
    "LoRA, rank 4": ("#d55e00", (0, (6, 2))),
    "FiLM attached, told another digit's angle": ("#2a97cf", (0, (1, 1))),
    "frozen base": ("#9aa4af", "-"),
}
SIZES: Final = {
    "LoRA": ("#d55e00", "s"),
    "LoRA, told the angle": ("#008f6b", "D"),
    "FiLM attached": ("#0072b2", "o"),
}
POINTS: Final = {
    "adaLN-Zero attached": ("#7a5230", "^"),
    "LoRA, rank 2, and FiLM attached": ("#b8478f", "P"),
    "all weights": ("#a37500", "X"),
    "all weights, told the angle": ("#444c56", "*"),
}
STRIPS: Final = ("frozen base", "LoRA, rank 4", "FiLM attached", "LoRA, rank 2, and FiLM attached")
WRONG: Final = "#d55e00"


def draw_angles(path: Path, results: Mapping[str, Any]) -> None:
    """Accuracy at each angle, the mean over seeds."""
    figure, axes = blank(9, 4.8)
    for name, (colour, dashes) in LINES.items():
        by_angle = results["methods"][name]["by_angle"]
        axes.plot(
            [*results["angles"], 360],
            [*by_angle, by_angle[0]],
            color=colour,
            linestyle=dashes,
            linewidth=2.2,
            label=name,
        )
    axes.set_xticks(range(0, 361, 45), [f"{angle}°" for angle in range(0, 361, 45)])
    axes.set_xlim(0, 360)
    axes.set_ylim(0, 1)
    axes.set_xlabel("angle by which the digits are turned", fontsize=12)
    axes.set_title("Share of held-out digits read right", color=INK, loc="left", fontsize=13)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=2,
        frameon=False,
        fontsize=11,
    )
    figure.savefig(path)


def draw_sizes(path: Path, results: Mapping[str, Any]) -> None:
    """Accuracy over all angles against what trains; bars reach from the worst seed to the best."""
    figure, axes = blank(9, 4.8)
    found = results["methods"]
    lines = {name: (names, SIZES[name]) for name, names in results["sizes"].items()}
    lines |= {name: ([name], look) for name, look in POINTS.items()}
    for label, (names, (colour, mark)) in lines.items():
        means = [fmean(found[name]["accuracy"]) for name in names]
        reach = [
            [mean - min(found[name]["accuracy"]) for mean, name in zip(means, names, strict=True)],
            [max(found[name]["accuracy"]) - mean for mean, name in zip(means, names, strict=True)],
        ]
        axes.errorbar(
            [found[name]["parameters"] for name in names],
            means,
            reach,
            color=colour,
            marker=mark,
            markersize=9,
            linewidth=1.8,
            capsize=3,
            label=label,
        )
    axes.set_xscale("log")
    ticks = [2000, 5000, 10_000, 20_000, 50_000]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("parameters that train", fontsize=12)
    axes.set_title(
        "Share of held-out digits read right, over all angles", color=INK, loc="left", fontsize=13
    )
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=3,
        frameon=False,
        fontsize=11,
    )
    figure.savefig(path)


def draw_strips(path: Path, results: Mapping[str, Any]) -> None:
    """Single digits at every second angle, and below each what the models take it for."""
    test = digits()[2]
    angles = results["angles"][::2]
    figure = Figure(figsize=(10, 2 * len(results["shown"]["digits"]) + 0.6), dpi=150)
    figure.set_facecolor("white")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(results["shown"]["digits"]), 1, squeeze=False)[:, 0]
    for number, (axes, place) in enumerate(zip(rows, shown(test), strict=True)):
        turned = turn(
            test.images[place].expand(len(angles), -1, -1, -1), torch.tensor(angles).float()
        )
        image = sheet([turned], len(angles), ink=True)
        height, width = image.shape[:2]
        cell = width / len(angles)
        axes.imshow(image, interpolation="nearest", extent=(0, len(angles), 0, height / cell))
        for line, name in enumerate(STRIPS):
            down = -0.35 - 0.5 * line
            axes.text(-0.15, down, name, ha="right", va="center", fontsize=10.5, color=SOFT)
            for column, digit in enumerate(results["shown"]["read"][name][number]):
                right = digit == results["shown"]["digits"][number]
                axes.text(
                    column + 0.5,
                    down,
                    str(digit),
                    ha="center",
                    va="center",
                    fontsize=12,
                    fontweight="normal" if right else "bold",
                    color=INK if right else "white",
                    bbox=None if right else {"facecolor": WRONG, "linewidth": 0, "pad": 2.5},
                )
        if not number:
            for column, angle in enumerate(angles):
                axes.text(column + 0.5, height / cell + 0.12, f"{angle}°", ha="center", color=SOFT)
        axes.set_xlim(0, len(angles))
        axes.set_ylim(-0.2 - 0.5 * len(STRIPS), height / cell)
        axes.axis("off")
    figure.subplots_adjust(left=0.27, right=0.99, top=0.97, bottom=0.04, hspace=0.08)
    figure.text(0.01, 0.015, "on orange: read wrong", color=WRONG, fontsize=11)
    figure.savefig(path)


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure on white, which shows on dark pages too."""
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(visible=True, color=RULE, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11, colors=SOFT)
    return figure, axes
