"""What an inspection found: effects of conditions, parts of sites, alarms; as tables and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from condmod.tables import text_table

_IGNORED = 1e-3  # of the output's size


@dataclass(frozen=True)
class Effect:
    """What one condition does to the output; shares are of the output's root mean square.

    Attributes:
        condition: its name.
        swap: how much the output changes when each sample gets another one's.
        drop: how much it changes when the condition is absent; None where it cannot be.
        gradient: the relative change of the output for a relative change of the condition, by
            one random probe; None where the condition is no floating tensor, or the model runs
            without gradients.
    """

    condition: str
    swap: float
    drop: float | None
    gradient: float | None

    @property
    def ignored(self) -> bool:
        """Whether its value does not matter; that it is there at all may, see `drop`."""
        return self.swap < _IGNORED and (self.gradient or 0.0) < _IGNORED


@dataclass(frozen=True)
class PartOfSite:
    """The distribution of one generated part at one site.

    Attributes:
        site: the modulator's place.
        component: its spec.
        part: such as "scale", with the number of the sublayer before it where there are several.
        mean: over everything.
        spread: standard deviation over everything.
        samples: standard deviation over the batch, averaged: how much the condition decides.
        low: the least value.
        high: the largest value.
        closed: of a gate, the share of channels that let nothing through in any sample.
    """

    site: str
    component: str
    part: str
    mean: float
    spread: float
    samples: float
    low: float
    high: float
    closed: float | None

    @property
    def numbers(self) -> tuple[float, ...]:
        """Mean, spread, samples, low and high."""
        return self.mean, self.spread, self.samples, self.low, self.high


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; prints as two tables and the alarms.

    Attributes:
        effects: of every condition.
        parts: of every site, in the order in which they were generated.
    """

    effects: tuple[Effect, ...]
    parts: tuple[PartOfSite, ...]

    @property
    def alarms(self) -> list[str]:
        """What should not be so; one line each."""
        told = []
        if any(not isfinite(effect.swap) for effect in self.effects):
            told.append("the output has NaN or infinite values, so no effect is known")
        told += [
            f"the condition {effect.condition!r} is ignored: the output is the same with another "
            "sample's; is it wired in, and past a start at zero?"
            for effect in self.effects
            if effect.ignored
        ]
        shut = [f"{p.site} {p.part}" for p in self.parts if p.closed is not None and p.closed == 1]
        if shut:
            told.append(f"gates let nothing through: {_few(shut)}")
        still = [
            site
            for site in dict.fromkeys(part.site for part in self.parts)
            if all(p.samples <= _IGNORED * abs(p.spread) for p in self.parts if p.site == site)
        ]
        if still:
            told.append(f"every sample gets the same modulation: {_few(still)}")
        return told

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "effects": [{**asdict(effect), "ignored": effect.ignored} for effect in self.effects],
            "parts": [asdict(part) for part in self.parts],
            "alarms": self.alarms,
        }

    def plot(self, path: str | Path) -> None:
        """Draw the effects, and the parts of all sites, into a picture.

        Raises:
            ModuleNotFoundError: matplotlib is missing.
        """
        from condmod.care.inspection_plot import draw

        draw(self, path)

    def __str__(self) -> str:
        effects = [
            (
                e.condition,
                f"{e.swap:.2g}",
                _share(e.drop),
                _share(e.gradient),
                "ignored" * e.ignored,
            )
            for e in self.effects
        ]
        parts = [
            (p.site, p.component, p.part, *map("{:.3g}".format, p.numbers), _percent(p.closed))
            for p in self.parts
        ]
        head = ("site", "modulator", "part", "mean", "spread", "samples", "low", "high", "closed")
        tables = [_table(("condition", "swap", "drop", "gradient", ""), effects)] if effects else []
        tables += [_table(head, parts)] if parts else []
        return "\n\n".join([*tables, "\n".join(self.alarms) or "no alarm"])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Words to the left, numbers to the right."""
    numbers = {
        i
        for i in range(len(head))
        if any(row[i][:1].isdigit() or row[i][:1] == "-" for row in rows)
    }
    return "\n".join(text_table(head, rows, numbers))
