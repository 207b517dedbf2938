"""Which differences between compared specs are real: paired intervals over seeds and samples.

Item i of seed s means the same noise and label, or the same held-out image, under every spec, so
specs are compared item by item and what all of them find hard cancels. A difference varies for two
reasons: training again from another seed, and judging by other items. Its interval has a part for
each.

Seeds. With d_s the difference in seed s, their mean has the variance sd(d)²/S. A bootstrap over
seeds would find (S-1)/S of that, which is why it is too narrow for few seeds; mended by S/(S-1)
(Hesterberg 2015, arXiv 1411.5279) nothing is left to draw. The quantile is Student's, t(S-1).

Items. sd(d)²/S has seen whatever differs from seed to seed, items among it, but not what the seeds
share: where all are judged by the same held-out images, other images would have moved them
together. That is the covariance between seeds when items are resampled, the same ones in every
seed and for both specs; the mean over pairs of seeds of this bootstrap covariance is added, with
the normal quantile, for it rests on many items.

    half width² = max(t²·sd(d)²/S + z²·shared, z²·items)

with `items` the bootstrap's variance of the mean difference, what there would be if training were
the same for every seed: S seeds may by chance lie closer together than that.

A hierarchical bootstrap, seeds and then items within each seed, counts items twice where they
differ between seeds and loses them where they are shared. Simulated with 5 seeds of 200 items and
no true difference, its interval leaves out 0 in 16 of 100 experiments where seeds make the noise,
and in 34 where shared items do; the one above in about 5 or fewer, whatever the mixture
(tests/lab/test_lab_paired.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, Final, Literal

import torch
from jaxtyping import Float, Int
from scipy.special import ndtri, stdtrit
from torch import Tensor

Reduce = Literal["mean", "median"]
Better = Literal["lower", "higher"]

_CONFIDENCE: Final = 0.95
_QUANTILE: Final = (1 + _CONFIDENCE) / 2
_DRAWS: Final = 2000
_MANY: Final = 4
_CHUNK: Final = 4_000_000  # items drawn at once: 100 MB or so


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a comparison: what it is, and how it is summed up and shown."""

    name: str
    title: str
    better: Better | None
    reduce: Reduce | None
    """What one seed's items become; None for a cost, which has one value per seed."""
    unit: Literal["", "ms", "s"]
    """What it is shown in; times are kept in seconds."""
    digits: int
    """Decimals that are shown."""
    meaning: str
    pairwise: bool = False
    """Whether an item is its mean over pairs with the other items of its seed."""


FIGURES: Final[tuple[Figure, ...]] = (
    Figure(
        "held_out_loss",
        "held-out loss",
        "lower",
        "mean",
        "",
        4,
        "Squared error of the velocity on images that nothing was trained on, with the same noise "
        "and times for every spec.",
    ),
    Figure(
        "conditional_accuracy",
        "accuracy",
        "higher",
        "mean",
        "",
        3,
        "Share of the drawn images that a classifier, fitted on the training images alone, reads "
        "as the class they were asked to be.",
    ),
    Figure(
        "diversity_ratio",
        "diversity",
        None,
        "mean",
        "",
        3,
        "Mean distance between two drawn images of a class, over that of held-out images. 1 is as "
        "diverse as real images; far less is a sampler that repeats itself.",
        pairwise=True,
    ),
    Figure(
        "novelty_ratio",
        "novelty",
        None,
        "median",
        "",
        3,
        "Median distance to the nearest training image, over the held-out images' own. 0 is a "
        "copy; 1 is as new as real images; far more is no such image at all.",
    ),
    Figure(
        "precision",
        "precision",
        "higher",
        "mean",
        "",
        3,
        "Share of the drawn images within the manifold of held-out ones (k-NN, k = 3).",
    ),
    Figure(
        "recall",
        "recall",
        "higher",
        "mean",
        "",
        3,
        "Share of the held-out images within the manifold of the drawn ones (k-NN, k = 3). Noise "
        "reaches it too: it counts only where precision is high.",
    ),
    Figure(
        "parameters", "parameters", None, None, "", 0, "Parameters of the network that are trained."
    ),
    Figure("step_seconds", "step time", None, None, "ms", 1, "Time of one training step."),
    Figure("sample_seconds", "draw time", None, None, "s", 2, "Time to draw all the samples."),
)


@dataclass(frozen=True, slots=True)
class Difference:
    """What a has more than b, and the 95% interval around it; NaN where either was not measured."""

    mean: float
    low: float
    high: float

    @property
    def real(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the specs stand in one figure that has a better and a worse."""

    best: tuple[str, ...]
    """The best mean; several specs only where their means are equal."""
    tied: tuple[str, ...]
    """Not told apart from the best."""
    worse: tuple[str, ...]
    """Told apart from the best."""
    missing: tuple[str, ...]
    """Not measured in every seed."""


def difference(
    a: Float[Tensor, "S N"],
    b: Float[Tensor, "S N"],
    reduce: Reduce = "mean",
    *,
    draws: int = _DRAWS,
    seed: int = 0,
) -> Difference:
    """What spec a has more than spec b in one figure, with its interval.

    With one seed only items can be resampled: the interval then says nothing about training again.

    Args:
        a: (S, N), the items of every seed.
        b: (S, N), the same items under the other spec.
        reduce: what the items of a seed become.
        draws: how many times items are resampled.
        seed: decides the items drawn.
    """
    values = torch.stack([a, b]).double()
    return _compare(*_reduce(values, reduce), *_resample(values, reduce, draws, seed))


def summarise(
    specs: Sequence[str],
    seeds: Sequence[int],
    items: Mapping[str, Mapping[str, Tensor]],
    costs: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, Any]:
    """The parts of a comparison's document that follow from its measurements.

    Args:
        specs: the specs as texts, in the order in which they are shown.
        seeds: the S seeds of each.
        items: for each spec and figure (S, N), paired over specs; NaN where a run failed. N is one
            for a figure, and may differ between figures.
        costs: for each spec and cost one value per seed.

    Returns:
        figures: by name the title, how to show it, and for every spec mean, spread and values.
        pairs: every pair of specs in every figure, with its interval.
        standings: by figure in words.
        caution: what the intervals do not say, in words.
        Numbers that are not finite are None.
    """
    figures: dict[str, Any] = {}
    pairs: list[dict[str, Any]] = []
    for figure in FIGURES:
        if figure.reduce is None:
            values = {spec: list(costs[spec][figure.name]) for spec in specs}
        else:
            table = torch.stack([items[spec][figure.name] for spec in specs]).double()
            if figure.pairwise:
                # An item is one side of its own pairs and the other side of all others': the mean
                # moves by twice an item's deviation (Hoeffding's projection of a U-statistic).
                table = 2 * table - table.mean(-1, keepdim=True)
            reduced = _reduce(table, figure.reduce)
            resampled = _resample(table, figure.reduce, _DRAWS, seed=0)
            values = {spec: row.tolist() for spec, row in zip(specs, reduced, strict=True)}
            for a, b in combinations(range(len(specs)), 2):
                found = _compare(reduced[a], reduced[b], resampled[a], resampled[b])
                pairs.append(_row(figure.name, specs[a], specs[b], found))
        figures[figure.name] = {
            "title": figure.title,
            "better": figure.better,
            "reduce": figure.reduce,
            "unit": figure.unit,
            "digits": figure.digits,
            "meaning": figure.meaning,
            "specs": {spec: _sum_up(values[spec]) for spec in specs},
        }
    compared = [figure.name for figure in FIGURES if figure.reduce]
    return {
        "figures": figures,
        "pairs": pairs,
        "standings": {name: _words(name, figures[name], pairs) for name in compared},
        "caution": _caution(len(seeds), len(pairs), len(compared)),
    }


def standing(
    name: str, figure: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]
) -> Standing | None:
    """Who is best in a figure and who is not told apart from that; None where nothing is better.

    Args:
        name: the figure.
        figure: its part of a document.
        pairs: the document's pairs.
    """
    if figure["better"] is None:
        return None
    means = {spec: part["mean"] for spec, part in figure["specs"].items()}
    measured = {spec: mean for spec, mean in means.items() if mean is not None}
    missing = tuple(spec for spec in means if spec not in measured)
    if not measured:
        return Standing((), (), (), missing)
    top = (min if figure["better"] == "lower" else max)(measured.values())
    best = tuple(spec for spec, mean in measured.items() if mean == top)
    apart = {
        frozenset((pair["a"], pair["b"]))
        for pair in pairs
        if pair["figure"] == name and pair["real"]
    }
    rest = [spec for spec in measured if spec not in best]
    worse = tuple(spec for spec in rest if all(frozenset((spec, one)) in apart for one in best))
    return Standing(best, tuple(spec for spec in rest if spec not in worse), worse, missing)


def _reduce(values: Float[Tensor, "*P S N"], reduce: Reduce) -> Float[Tensor, "*P S"]:
    return values.mean(-1) if reduce == "mean" else values.median(-1).values


def _resample(
    values: Float[Tensor, "P S N"], reduce: Reduce, draws: int, seed: int
) -> Float[Tensor, "P draws S"]:
    """What each seed would have become by other items, drawn once for all seeds and specs."""
    size = values.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    ordered, order = values.sort(-1)
    parts = []
    chunk = max(1, _CHUNK // size)
    for start in range(0, draws, chunk):
        shape = (min(chunk, draws - start), size)
        drawn = torch.randint(size, shape, generator=generator)
        counts = torch.zeros_like(drawn, dtype=values.dtype)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        if reduce == "mean":
            parts.append((values @ counts.T / size).mT)
        else:
            parts.append(_medians(ordered, order, counts))
    return torch.cat(parts, 1)


def _medians(
    ordered: Float[Tensor, "P S N"], order: Int[Tensor, "P S N"], counts: Float[Tensor, "draws N"]
) -> Float[Tensor, "P draws S"]:
    """Medians of rows whose items occur as often as counted; of two the lower, as in torch."""
    rows = zip(ordered.flatten(0, 1), order.flatten(0, 1), strict=True)
    middle = (counts.shape[1] - 1) // 2
    medians = [row[(counts[:, places].cumsum(1) <= middle).sum(1)] for row, places in rows]
    return torch.stack(medians).view(*ordered.shape[:2], -1).mT


def _compare(
    a: Float[Tensor, " S"],
    b: Float[Tensor, " S"],
    resampled_a: Float[Tensor, "draws S"],
    resampled_b: Float[Tensor, "draws S"],
) -> Difference:
    """The difference of reduced seeds, its interval by the rule at the top of this file."""
    each = a - b
    mean = float(each.mean())
    if not math.isfinite(mean):
        return Difference(math.nan, math.nan, math.nan)
    count = len(each)
    covariance = (resampled_a - resampled_b).mT.cov().reshape(count, count)
    normal = float(ndtri(_QUANTILE))
    square = normal**2 * float(covariance.mean())
    if count > 1:
        between = float(each.var()) / count
        off_diagonal = float(covariance.sum() - covariance.trace()) / (count * (count - 1))
        student = float(stdtrit(count - 1, _QUANTILE))
        square = max(square, student**2 * between + normal**2 * max(0.0, off_diagonal))
    half = math.sqrt(square)
    return Difference(mean, mean - half, mean + half)


def _sum_up(values: Sequence[float]) -> dict[str, Any]:
    """Mean, spread and values over seeds; mean and spread only where every seed has a value."""
    whole = all(map(math.isfinite, values))
    return {
        "mean": fmean(values) if whole else None,
        "spread": stdev(values) if whole and len(values) > 1 else None,
        "values": [_finite(value) for value in values],
    }


def _row(figure: str, a: str, b: str, found: Difference) -> dict[str, Any]:
    return {
        "figure": figure,
        "a": a,
        "b": b,
        "difference": _finite(found.mean),
        "low": _finite(found.low),
        "high": _finite(found.high),
        "real": found.real,
    }


def _finite(value: float) -> float | None:
    """What JSON can hold of a number."""
    return value if math.isfinite(value) else None


def _words(name: str, figure: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> str:
    """Where the specs stand in a figure."""
    own = [pair for pair in pairs if pair["figure"] == name and pair["difference"] is not None]
    real = sum(pair["real"] for pair in own)
    found = standing(name, figure, pairs)
    if found is None:
        return _range_in_words(figure, real, len(own))
    missing = f"; not measured in every seed: {_list(found.missing)}" if found.missing else ""
    if not found.best:
        return f"measured in every seed for no spec{missing}"
    several = len(found.best) > 1
    if own and not real:
        start = f"no two are told apart; {_list(found.best, 'and')} {'share' if several else 'has'}"
        return f"{start} the best mean{missing}"
    tied = f"; not told apart from {'them' if several else 'it'}: {_list(found.tied)}"
    count = len(found.worse)
    worse = f"; worse: {f'the other {count}' if count > _MANY else _list(found.worse)}"
    verb = "share the best mean" if several else "is best" if found.worse else "has the best mean"
    return (
        f"{_list(found.best, 'and')} {verb}"
        + (tied if found.tied else "")
        + (worse if found.worse else "")
        + missing
    )


def _range_in_words(figure: Mapping[str, Any], real: int, count: int) -> str:
    """Of a figure that has no better and worse: how far it reaches."""
    means = {spec: part["mean"] for spec, part in figure["specs"].items()}
    measured = {spec: mean for spec, mean in means.items() if mean is not None}
    missing = tuple(spec for spec in means if spec not in measured)
    ends = {choose(measured, key=measured.__getitem__) for choose in (min, max) if measured}
    reach = " to ".join(
        f"{measured[end]:.{figure['digits']}f} (`{end}`)"
        for end in sorted(ends, key=measured.__getitem__)
    )
    return (
        "1 is the real images' own"
        + (f"; {reach}" if measured else "")
        + (f"; told apart: {real} of {count} pairs" if count else "")
        + (f"; not measured in every seed: {_list(missing)}" if missing else "")
    )


def _caution(seeds: int, intervals: int, figures: int) -> str:
    """What a reader of the intervals should keep in mind."""
    alone = (
        "One seed: the intervals cover which images were drawn, not how training would turn out "
        "from another seed. "
        if seeds == 1
        else ""
    )
    pairs = intervals // figures
    return (
        f"{alone}{intervals} intervals ({pairs} pair{'s' * (pairs > 1)}, {figures} figures), each "
        "at 95% and none corrected for their number: if no two specs differed, about "
        f"{(1 - _CONFIDENCE) * intervals:.2g} of them would be called real all the same."
    )


def _list(specs: Sequence[str], last: str = "") -> str:
    """Specs in a row of code: "`a`, `b` and `c`"."""
    quoted = [f"`{spec}`" for spec in specs]
    if last and len(quoted) > 1:
        return f"{', '.join(quoted[:-1])} {last} {quoted[-1]}"
    return ", ".join(quoted)
