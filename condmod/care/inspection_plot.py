"""An inspection as a picture."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from condmod.care.inspection import Inspection

_COLOURS = ("#0b6e99", "#c2551b", "#9aa3ad")
_FLOOR = 1e-4  # of the logarithmic scale: what is less is drawn here


def draw(inspection: Inspection, path: str | Path) -> None:
    """Draw effects as bars, and below them every part at every site: mean, spread, low and high.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a plot needs matplotlib: pip install 'condmod[lab]', or print the inspection"
        ) from error
    by_part = sorted(inspection.parts, key=lambda part: part.part)
    parts = {name: list(rows) for name, rows in groupby(by_part, key=lambda row: row.part)}
    sites = list(dict.fromkeys(part.site for part in inspection.parts))
    bars = 0.6 + 0.45 * len(inspection.effects)
    rows = 0.8 + 0.22 * len(sites)
    figure = Figure(figsize=(max(7.0, 2.6 * len(parts)), bars + rows + 0.8), layout="constrained")
    (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(bars, rows))
    _effects(upper, inspection)
    _sites(lower, parts, sites)
    figure.savefig(path, dpi=150)


def _effects(figure, inspection: Inspection) -> None:  # type: ignore[no-untyped-def]
    axis = figure.subplots()
    effects = inspection.effects[::-1]
    for place, effect in enumerate(effects):
        measured = (("swap", effect.swap), ("drop", effect.drop), ("gradient", effect.gradient))
        for number, (name, value) in enumerate(measured):
            if value is None:
                continue
            height = place + 0.25 * (1 - number)
            axis.barh(height, max(value, _FLOOR), 0.22, left=0, color=_COLOURS[number])
            axis.text(max(value, _FLOOR) * 1.1, height, f"{name} {value:.2g}", va="center", size=7)
    labels = [f"{e.condition}\nIGNORED" if e.ignored else e.condition for e in effects]
    axis.set_yticks(range(len(effects)), labels)
    axis.set_xscale("log")
    axis.set_xlim(_FLOOR / 2, 20)
    axis.set_xlabel("change of the output, as a share of its size")
    axis.set_title("what each condition does", loc="left", size=10)
    axis.spines[["top", "right"]].set_visible(False)


def _sites(figure, parts, sites: list[str]) -> None:  # type: ignore[no-untyped-def]
    if not parts:
        return
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    places = {site: -number for number, site in enumerate(sites)}
    for axis, (name, rows) in zip(axes, parts.items(), strict=True):
        for row in rows:
            height = places[row.site]
            axis.plot([row.low, row.high], [height, height], color=_COLOURS[2], lw=1)
            ends = [row.mean - row.spread, row.mean + row.spread]
            axis.plot(ends, [height, height], color=_COLOURS[0], lw=4, solid_capstyle="butt")
            axis.plot([row.mean], [height], "o", color=_COLOURS[1], ms=4)
        axis.axvline(0, color=_COLOURS[2], lw=0.5)
        axis.set_title(name, loc="left", size=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    axes[0].set_yticks(list(places.values()), list(places))
    figure.supxlabel("mean (dot), one standard deviation (bar), lowest to highest (line)", size=8)
