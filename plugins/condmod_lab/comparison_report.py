"""How a comparison is shown: in the terminal, as CSV, as a picture, as a page to send around.

All of it is made of the one document that results.json holds; see `condmod_lab.paired.summarise`.
"""

from __future__ import annotations

import base64
import csv
import io
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from typing import Any, Final, Literal

import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from condmod_lab import comparison_charts as charts
from condmod_lab.paired import standing

_ARROWS: Final = {"lower": "↓", "higher": "↑", None: ""}
_SIGNS: Final = {"best": "*", "tied": "~", "": ""}
_PANELS: Final = (
    "held_out_loss",
    "conditional_accuracy",
    "diversity_ratio",
    "novelty_ratio",
    "precision",
)
_PARTS: Final = ("mean", "spread")
_RATIOS: Final = ("diversity_ratio", "novelty_ratio")
_GRID_PIXELS: Final = 260
_MOST_BANDS: Final = 6
_MARGIN: Final = 0.12

_INK: Final = "#1b1f24"
_SOFT: Final = "#56606b"
_FAINT: Final = "#9aa4af"
_RULE: Final = "#e6e9ec"
# Told apart also where colours are not: the page's specs carry numbers, the picture's dashes.
_COLORS: Final = (
    "#0072b2",
    "#d55e00",
    "#008f6b",
    "#b8478f",
    "#a37500",
    "#2a97cf",
    "#7a5230",
    "#444c56",
)
_DARK_COLORS: Final = (
    "#4db2ff",
    "#ff8a3d",
    "#2fd3a2",
    "#f08cc8",
    "#f0b429",
    "#9adcff",
    "#d0a884",
    "#c3cad3",
)
_DASHES: Final = ("", "6 3", "2 3")


@dataclass(frozen=True, slots=True)
class _Cell:
    """One spec's value of one figure, as it is shown."""

    mean: str
    spread: str
    """Empty where there is none."""
    mark: str
    """`best`, `tied` or nothing."""
    values: str


def print_table(document: Mapping[str, Any], console: Console) -> None:
    """Print the figures of every spec, and where they stand; readable from 80 columns on."""
    figures = document["figures"]
    measured = [name for name in figures if figures[name]["reduce"]]
    cells = table_cells(document)
    for names in (measured, [name for name in figures if name not in measured]):
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
        table.add_column("modulator", overflow="fold", min_width=16)
        for name in names:
            words = textwrap.wrap(column_heading(figures[name]), 9, break_long_words=False)
            table.add_column(Text("\n".join(words)), justify="right")
        for spec in document["specs"]:
            table.add_row(Text(spec), *(_shown(cells[name, spec]) for name in names))
        console.print(table)
        console.print()
    several = "mean ± standard deviation over seeds; " if len(document["seeds"]) > 1 else ""
    console.print(Text(f"{several}* best mean, ~ not told apart from it"))
    console.print()
    for name, words in document["standings"].items():
        console.print(Text.assemble((f"{figures[name]['title']}: ", "bold"), words))
    console.print()
    for name, error in document["failed"].items():
        console.print(Text.assemble((f"failed: {name}: ", "bold"), error))
    console.print(Text(document["caution"], style="dim"))


def write_csv(document: Mapping[str, Any], path: Path) -> None:
    """Write a row per spec: mean and spread of every figure, times in seconds."""
    figures = document["figures"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["spec", *(f"{name}_{part}" for name in figures for part in _PARTS)])
        for spec in document["specs"]:
            parts = [figure["specs"][spec] for figure in figures.values()]
            writer.writerow([spec, *(part[key] for part in parts for key in _PARTS)])


def write_pairs_csv(document: Mapping[str, Any], path: Path) -> None:
    """Write a row per figure and pair of specs: what a has more than b, its interval, if real."""
    columns = ["figure", "a", "b", "difference", "low", "high", "real"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(document["pairs"])


def draw_comparison(document: Mapping[str, Any], path: Path) -> None:
    """Draw every seed's value of the main figures, and the loss over the steps, as PNG."""
    specs = document["specs"]
    wrap = textwrap.TextWrapper(34, break_on_hyphens=False, max_lines=2, placeholder=" …")
    labels = [wrap.fill(spec) for spec in specs]
    lines = sum(label.count("\n") + 1 for label in labels)
    rows, below = 0.9 + 0.16 * len(specs) + 0.17 * lines, max(3.6, 0.6 + 0.19 * lines)
    figure = Figure(figsize=(14, rows + below), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    halves = figure.add_gridspec(2, 1, height_ratios=(rows, below))
    upper, lower = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    panels = upper.subplots(1, len(_PANELS), sharey=True)
    for axes, name in zip(panels, _PANELS, strict=True):
        _draw_seeds(axes, document, name)
    panels[0].set_yticks(range(len(specs)), labels)
    panels[0].set_ylim(len(specs) - 0.5, -0.5)
    _draw_curves(lower.subplots(), document, labels)
    figure.suptitle(
        "dots are seeds, diamonds their mean, filled where it is best", fontsize=9, color=_SOFT
    )
    figure.savefig(path)


def write_html(
    document: Mapping[str, Any],
    grids: Mapping[str, Tensor],
    path: Path,
    *,
    real: Tensor,
    ink: bool,
) -> None:
    """Write the whole comparison as one page that needs nothing else, not even a network.

    Args:
        document: what results.json holds.
        grids: for each spec that drew any, (classes, columns, C, H, W) from -1 to 1.
        path: the HTML file to write.
        real: held-out images, as the grids.
        ink: whether 1 is ink on light paper, or else light; of one channel only.
    """
    figures, specs = document["figures"], document["specs"]
    cells = table_cells(document)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["words"] = _marked_up
    template = files("condmod_lab").joinpath("comparison.html.jinja").read_text(encoding="utf-8")
    compared = [name for name in figures if figures[name]["reduce"]]
    scatters = [
        charts.scatter(document, cost, quality)
        for quality in ("held_out_loss", "conditional_accuracy")
        for cost in ("parameters", "step_seconds")
    ]
    page = environment.from_string(template).render(
        document=document,
        data=_data(document["config"]),
        facts=at_a_glance(document),
        settings=list(_leaves(document["config"])),
        headings={name: column_heading(figure) for name, figure in figures.items()},
        rows=[(spec, [cells[name, spec] for name in figures]) for spec in specs],
        forests=[charts.forest(document, name) for name in compared],
        matrices=[(figures[name], _matrix(document, name)) for name in compared],
        real=_picture(real, ink=ink),
        grids=[(specs.index(spec), spec, _picture(grid, ink=ink)) for spec, grid in grids.items()],
        curves=charts.curves(document),
        curves_size=charts.CURVES,
        bands=_with_bands(document),
        scatters=[scatter for scatter in scatters if scatter],
        scatter_size=charts.SCATTER,
        colors=_COLORS,
        dark_colors=_DARK_COLORS,
        dashes=_DASHES,
    )
    path.write_text(page, encoding="utf-8")


def table_cells(document: Mapping[str, Any]) -> dict[tuple[str, str], _Cell]:
    """What a table holds, by figure and spec."""
    cells = {}
    for name, figure in document["figures"].items():
        found = standing(name, figure, document["pairs"])
        best = found.best if found else ()
        tied = found.tied if found else ()
        for spec, part in figure["specs"].items():
            mark = "best" if spec in best else "tied" if spec in tied else ""
            known = part["spread"] is not None and name != "parameters"  # every seed has as many
            wide = f"±{_number(part['spread'], figure)}" if known else ""
            values = ", ".join(_number(value, figure) for value in part["values"])
            cells[name, spec] = _Cell(_number(part["mean"], figure), wide, mark, values)
    return cells


def _number(value: float | None, figure: Mapping[str, Any]) -> str:
    if value is None:
        return "n/a"
    return f"{value * (1000 if figure['unit'] == 'ms' else 1):,.{figure['digits']}f}"


def column_heading(figure: Mapping[str, Any]) -> str:
    """`accuracy ↑`, `step time, ms`."""
    unit = f", {figure['unit']}" if figure["unit"] else ""
    return f"{figure['title']}{unit} {_ARROWS[figure['better']]}".rstrip()


def _shown(cell: _Cell) -> Text:
    """A cell of two lines for the terminal."""
    style = {"best": "bold green", "tied": "green", "": ""}[cell.mark]
    sign = _SIGNS[cell.mark] or " "
    below = f"\n{cell.spread} " if cell.spread else ""
    return Text.assemble((f"{cell.mean}{sign}", style), (below, "dim"))


def _draw_seeds(axes: Axes, document: Mapping[str, Any], name: str) -> None:
    """A row per spec: a dot for every seed, a bar at their mean; the best mean is filled."""
    figure = document["figures"][name]
    found = standing(name, figure, document["pairs"])
    best = found.best if found else ()
    if name in _RATIOS:
        axes.axvline(1, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    means = [part["mean"] for part in figure["specs"].values() if part["mean"] is not None]
    low, high = charts.window(means) if means else (-math.inf, math.inf)
    near = [
        value
        for part in figure["specs"].values()
        if part["mean"] is not None and low <= part["mean"] <= high
        for value in part["values"]
    ]
    if near:  # the axis reaches a little farther, and what is on it is drawn
        room = _MARGIN * (max(near) - min(near))
        low, high = min(low, min(near) - room), max(high, max(near) + room)
    for row, (spec, color) in enumerate(zip(document["specs"], cycle(_COLORS), strict=False)):
        part = figure["specs"][spec]
        mean, values = part["mean"], part["values"]
        if mean is None:
            _note(axes, row, "n/a", right=True)
        elif not low <= mean <= high:
            _note(axes, row, _number(mean, figure), right=mean > high)
        else:
            face = color if spec in best else "white"
            axes.scatter(mean, row, s=52, marker="D", facecolor=face, edgecolor=color, zorder=1)
            axes.scatter(values, [row] * len(values), s=22, color=color, alpha=0.45, linewidths=0)
    axes.set_title(column_heading(figure), color=_INK, fontsize=11, loc="left")
    axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=_INK)
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=4)
    axes.margins(x=_MARGIN)
    axes.grid(axis="x", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _note(axes: Axes, row: int, text: str, *, right: bool) -> None:
    """Tell at the panel's edge what it does not hold."""
    shown = text if text == "n/a" else f"{text} →" if right else f"← {text}"
    where = (0.98 if right else 0.02, row)
    side: Literal["left", "right"] = "right" if right else "left"
    at = ("axes fraction", "data")
    axes.annotate(shown, where, xycoords=at, ha=side, va="center", fontsize=8, color=_SOFT)


def _draw_curves(axes: Axes, document: Mapping[str, Any], labels: Sequence[str]) -> None:
    """The loss of every spec over the steps, the mean of its seeds."""
    tops, bands = [], _with_bands(document)
    for place, (spec, label) in enumerate(zip(document["specs"], labels, strict=True)):
        color = _COLORS[place % len(_COLORS)]
        dash = _DASHES[place // len(_COLORS) % len(_DASHES)]
        style = (0, tuple(map(float, dash.split()))) if dash else "-"
        points = charts.thin(document["curves"][spec])
        steps, losses, lows, highs = zip(*points, strict=True) if points else [()] * 4
        axes.plot(steps, losses, color=color, linestyle=style, linewidth=1.6, label=label)
        if bands:
            axes.fill_between(steps, lows, highs, color=color, alpha=0.12, linewidth=0)
        tops += [charts.after_the_fall(points)] if points else []
    if tops:  # else there is nothing that a logarithmic axis could span
        axes.set_yscale("log")
        axes.set_ylim(top=max(tops))
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks("{x:g}")
    axes.tick_params(which="both", labelsize=8)
    axes.set_xlabel("training step")
    title = f"training loss, mean{' and range' if bands else ''} over seeds"
    axes.set_title(title, color=_INK, fontsize=11, loc="left")
    axes.grid(visible=True, which="both", color=_RULE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)


def _with_bands(document: Mapping[str, Any]) -> bool:
    """Whether the curves show the range of their seeds: of many, bands would hide the lines."""
    return len(document["seeds"]) > 1 and len(document["specs"]) <= _MOST_BANDS


def _data(config: Mapping[str, Any]) -> str:
    """The data's name: of one's own pictures, their folder's or file's."""
    data = config["data"]
    return Path(data["path"]).name if "path" in data else str(data["name"])


def at_a_glance(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was compared, in a few lines."""
    config, machine = document["config"], document["machine"]
    training, sampling = config["training"], config["sampling"]
    return [
        ("Budget", f"{training['steps']:,} steps of {training['batch']} images each"),
        ("Seeds", ", ".join(map(str, document["seeds"]))),
        ("Data", ", ".join(_settings(config["data"]))),
        ("Network", ", ".join(_settings(config["backbone"]))),
        (
            "Drawn",
            f"{sampling['samples']:,} images per seed, {sampling['steps']} Euler steps, "
            f"guidance {sampling['guidance']:g}",
        ),
        ("Machine", ", ".join(f"{key} {value}" for key, value in machine.items())),
    ]


def _settings(section: Mapping[str, Any]) -> Iterator[str]:
    """`conv`, `channels 32`, ..."""
    for key, value in section.items():
        yield str(value) if key == "name" else f"{key} {value}"


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of the config that all runs share, under its dotted key."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif prefix or key not in {"modulator", "seed", "output"}:
            yield prefix + key, value


def _marked_up(text: str) -> Markup:
    """Words in which `specs` stand in backticks, as HTML."""
    parts = re.split("`([^`]*)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part)
        for place, part in enumerate(parts)
    )


def _matrix(document: Mapping[str, Any], name: str) -> list[list[tuple[str, str]]]:
    """What each row's spec has more than each column's: text and kind, as in a forest."""
    specs, figure = document["specs"], document["figures"][name]
    found: dict[tuple[str, str], tuple[float | None, bool]] = {}
    for pair in document["pairs"]:
        if pair["figure"] == name:
            more = pair["difference"]
            found[pair["a"], pair["b"]] = (more, pair["real"])
            found[pair["b"], pair["a"]] = (None if more is None else -more, pair["real"])
    return [
        [("", "self") if row == column else _entry(*found[row, column], figure) for column in specs]
        for row in specs
    ]


def _entry(more: float | None, real: bool, figure: Mapping[str, Any]) -> tuple[str, str]:
    if more is None:
        return "n/a", "missing"
    if not real:
        return "·", "same"
    return charts.signed(more, figure), charts.kind(more, figure)


def _picture(grid: Tensor, *, ink: bool) -> dict[str, Any]:
    """A grid (classes, columns, C, H, W) from -1 to 1 as a PNG within the page, and its size."""
    rows, columns, channels, height, width = grid.shape
    light = (grid.double().nan_to_num(-1).clamp(-1, 1) + 1) / 2
    if channels == 1:
        light = (1 - light if ink else light).expand(-1, -1, 3, -1, -1)
    sheet = torch.zeros(rows * (height + 1) - 1, columns * (width + 1) - 1, 4)  # gaps are clear
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + 1), column * (width + 1)
            cell = sheet[top : top + height, left : left + width]
            cell[..., :3] = light[row, column].permute(1, 2, 0)
            cell[..., 3] = 1
    file = io.BytesIO()
    Image.fromarray((sheet * 255).round().byte().numpy()).save(file, "PNG", optimize=True)
    scale = max(1, _GRID_PIXELS // sheet.shape[1])
    return {
        "source": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
        "width": sheet.shape[1] * scale,
        "height": sheet.shape[0] * scale,
    }
