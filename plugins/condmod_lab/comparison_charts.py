"""Where the marks of a comparison's charts go; the page's template draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, median_low
from typing import Any, Final

from matplotlib.ticker import LogLocator, MaxNLocator

CURVES: Final = (720, 340)
"""Width and height of the loss curves."""
SCATTER: Final = (360, 250)
"""Width and height of a chart of cost against quality."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 40, 12, 40
_LABEL_GAP: Final = 17
_SPANS: Final = 60
_TICKS: Final = 4
_FAR: Final = 4


@dataclass(frozen=True, slots=True)
class Tick:
    """A line of a scale: its place and what is written there."""

    place: float
    text: str


@dataclass(frozen=True, slots=True)
class Scale:
    """Values to places; equal steps or, of a logarithmic scale, equal factors."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value goes."""
        low, high = self._bend(self.low), self._bend(self.high)
        share = (self._bend(value) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, write: Callable[[float], str] = "{:g}".format) -> list[Tick]:
        """Round values within the scale."""
        locator = LogLocator(subs=(1, 2, 5)) if self.logarithmic else MaxNLocator(_TICKS)
        values = [float(value) for value in locator.tick_values(self.low, self.high)]
        inside = [value for value in values if self.low <= value <= self.high]
        return [Tick(self.place(value), write(value)) for value in inside]

    def _bend(self, value: float) -> float:
        return math.log(value) if self.logarithmic else value


@dataclass(frozen=True, slots=True)
class ForestRow:
    """A spec against the first: its difference, and places in percent of the chart's width."""

    spec: int
    text: str
    kind: str
    """`better`, `worse`, `other` (real, where nothing is better), `same` or `missing`."""
    low: float = 0
    middle: float = 0
    high: float = 0
    """Within 0 to 100; the chart shows by arrows what lies beyond."""
    left: bool = False
    right: bool = False
    inside: bool = True


@dataclass(frozen=True, slots=True)
class Forest:
    """Every spec against the first in one figure."""

    # Where one spec is far off, as `none` is among others, the scale is that of the others.

    title: str
    better: str | None
    rows: list[ForestRow]
    zero: float
    ticks: list[Tick]


@dataclass(frozen=True, slots=True)
class Line:
    """A spec's curve, the band of its seeds, and the place of its number."""

    spec: int
    points: str
    band: str
    label: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Curves:
    """The loss of every spec over the steps."""

    lines: list[Line]
    across: list[Tick]
    up: list[Tick]


@dataclass(frozen=True, slots=True)
class Dot:
    """A spec's place in a scatter, its number's place, and the ends of its spread."""

    spec: int
    x: float
    y: float
    label: tuple[float, float]
    low: float
    high: float
    beyond: str
    """What is written at a dot that lies beyond the chart's edge, else nothing."""


@dataclass(frozen=True, slots=True)
class Scatter:
    """A cost against a quality."""

    cost: str
    quality: str
    better: str | None
    dots: list[Dot]
    across: list[Tick]
    up: list[Tick]


def forest(document: Mapping[str, Any], name: str) -> Forest:
    """What every spec has more than the first, with intervals, in one figure."""
    figure, specs = document["figures"][name], document["specs"]
    found = {
        pair["b"]: [0.0 - pair[key] for key in ("high", "difference", "low")]
        for pair in document["pairs"]
        if pair["figure"] == name and pair["a"] == specs[0] and pair["difference"] is not None
    }
    reach = {spec: max(map(abs, triple)) for spec, triple in found.items()}
    limit = _FAR * median_low(reach.values()) or math.inf if reach else math.inf
    near = [found[spec] for spec in reach if reach[spec] <= limit]
    ends = [0.0, *(value for triple in near for value in triple)]
    scale = _padded(min(ends), max(ends), 0, 100, share=0.04)
    rows = [
        _forest_row(number, found.get(spec), figure, scale)
        for number, spec in enumerate(specs)
        if number
    ]
    ticks = scale.ticks(lambda value: f"{value:+g}".replace("-", "−") if value else "0")
    return Forest(figure["title"], figure["better"], rows, scale.place(0), ticks)


def curves(document: Mapping[str, Any]) -> Curves | None:
    """The loss curves; None where no run has logged any."""
    whole = [thin(document["curves"][spec]) for spec in document["specs"]]
    drawn = {number: line for number, line in enumerate(whole) if line}
    if not drawn:
        return None
    points = [point for line in drawn.values() for point in line]
    width, height = CURVES
    x = Scale(0, max(point[0] for point in points), _LEFT, width - _RIGHT)
    low = min(point[2] for point in points)
    high = max(map(after_the_fall, drawn.values()))
    y = Scale(0.97 * low, 1.03 * high, height - _BOTTOM, _TOP, logarithmic=True)
    ends = {number: y.place(line[-1][1]) for number, line in drawn.items()}
    labels = _apart(ends, _TOP, height - _BOTTOM)
    lines = []
    for number, line in drawn.items():
        there = [f"{x.place(step)},{y.place(high)}" for step, _, _, high in line]
        back = [f"{x.place(step)},{y.place(low)}" for step, _, low, _ in reversed(line)]
        lines.append(
            Line(
                number,
                " ".join(f"{x.place(step)},{y.place(loss)}" for step, loss, _, _ in line),
                " ".join(there + back),
                (x.place(line[-1][0]) + 16, labels[number]),
            )
        )
    return Curves(lines, x.ticks("{:,.0f}".format), y.ticks())


def scatter(document: Mapping[str, Any], cost: str, quality: str) -> Scatter | None:
    """Every spec's cost and quality; None where no spec has both."""
    across, up = document["figures"][cost], document["figures"][quality]
    factor = 1000 if across["unit"] == "ms" else 1
    places = {}
    for number, spec in enumerate(document["specs"]):
        price, worth = across["specs"][spec], up["specs"][spec]
        if price["mean"] is not None and worth["mean"] is not None:
            places[number] = (factor * price["mean"], worth["mean"], worth["spread"] or 0.0)
    if not places:
        return None
    width, height = SCATTER
    prices = [price for price, _, _ in places.values()]
    low, high = window([worth for _, worth, _ in places.values()])
    near = [place for place in places.values() if low <= place[1] <= high]
    ends = [worth + sign * wide for _, worth, wide in near for sign in (-1, 1)]
    x = _padded(min(prices), max(prices), _LEFT, width - _RIGHT, share=0.08)
    far = len(near) < len(places)
    y = _padded(min(ends), max(ends), height - _BOTTOM, _TOP, share=0.2 if far else 0.08)
    inset = 0.05 * (y.high - y.low)
    edge = {
        number: min(y.high - inset, max(y.low + inset, worth)) if far else worth
        for number, (_, worth, _) in places.items()
    }
    dots: list[Dot] = []
    taken = [(x.place(price), y.place(edge[number])) for number, (price, _, _) in places.items()]
    for (number, (_, worth, wide)), here in zip(places.items(), tuple(taken), strict=True):
        beyond = f"{worth:.{up['digits']}f}" if edge[number] != worth else ""
        label = (here[0] + 13, here[1]) if beyond else _free(here, taken)
        taken.append(label)
        down, top = (here[1], here[1]) if beyond else (y.place(worth - wide), y.place(worth + wide))
        dots.append(Dot(number, *here, label, down, top, beyond))
    title = across["title"] + (f", {across['unit']}" if across["unit"] else "")
    return Scatter(
        title, up["title"], up["better"], dots, x.ticks("{:,.6g}".format), y.ticks("{:.4g}".format)
    )


def thin(curve: Mapping[str, Sequence[float]]) -> list[tuple[float, float, float, float]]:
    """A curve's step, loss, low and high, each its mean over a sixtieth of the points.

    Points that a logarithmic scale cannot hold are left out: a diverged run may end in some.
    """
    points = zip(curve["step"], curve["loss"], curve["low"], curve["high"], strict=True)
    rows = [point for point in points if all(0 < value < math.inf for value in point[1:])]
    if not rows:
        return []
    spans = min(_SPANS, len(rows))
    edges = [len(rows) * span // spans for span in range(spans + 1)]
    parts = [tuple(map(fmean, zip(*rows[a:b], strict=True))) for a, b in pairwise(edges)]
    return [(step, loss, low, high) for step, loss, low, high in parts]


def window(values: Sequence[float]) -> tuple[float, float]:
    """From where to where to look, so that a few values far off do not hide the others.

    It always holds half of the values: those within eight times their median distance from the
    median.
    """
    middle = median(values)
    reach = 2 * _FAR * median(abs(value - middle) for value in values) or math.inf
    near = [value for value in values if abs(value - middle) <= reach]
    return min(near), max(near)


def after_the_fall(points: Sequence[tuple[float, float, float, float]]) -> float:
    """The highest that a curve's band reaches after its first tenth, a fall that hides the rest."""
    return max(high for _, _, _, high in points[len(points) // 10 :])


def signed(more: float, figure: Mapping[str, Any]) -> str:
    """A difference with its sign: `+0.012`."""
    return f"{more:+.{figure['digits']}f}".replace("-", "−")


def kind(more: float, figure: Mapping[str, Any]) -> str:
    """What a real difference means: `better`, `worse`, or `other` where nothing is better."""
    if figure["better"] is None:
        return "other"
    return "better" if (more > 0) == (figure["better"] == "higher") else "worse"


def _forest_row(
    number: int, found: Sequence[float] | None, figure: Mapping[str, Any], scale: Scale
) -> ForestRow:
    if found is None:
        return ForestRow(number, "n/a", "missing")
    low, middle, high = found
    text = f"{signed(middle, figure)} [{signed(low, figure)}, {signed(high, figure)}]"
    meaning = "same" if low <= 0 <= high else kind(middle, figure)
    start, dot, end = (min(100.0, max(0.0, scale.place(value))) for value in found)
    left, right = low < scale.low, high > scale.high
    inside = scale.low <= middle <= scale.high
    return ForestRow(number, text, meaning, start, dot, end, left, right, inside)


def _padded(low: float, high: float, start: float, end: float, *, share: float) -> Scale:
    """A scale a little wider than its values, also where there is but one."""
    margin = share * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - margin, high + margin, start, end)


def _apart(places: Mapping[int, float], top: float, bottom: float) -> dict[int, float]:
    """The places moved as little as it takes for numbers not to overlap."""
    order = sorted(places, key=places.__getitem__)
    gap = min(_LABEL_GAP, (bottom - top) / len(order))
    moved: dict[int, float] = {}
    last = top - gap
    for number in order:
        last = moved[number] = max(places[number], last + gap)
    last = bottom + gap
    for number in reversed(order):
        last = moved[number] = min(moved[number], last - gap)
    return {number: round(place, 2) for number, place in moved.items()}


def _free(here: tuple[float, float], taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of the places around a dot the one farthest from whatever is drawn already."""
    around = [
        (round(here[0] + 13 * math.cos(turn), 2), round(here[1] + 13 * math.sin(turn), 2))
        for turn in map(math.radians, (0, 45, 315, 180, 135, 225))  # never on a whisker
    ]
    others = [place for place in taken if place != here]
    return max(
        around, key=lambda place: min((math.dist(place, other) for other in others), default=0)
    )
