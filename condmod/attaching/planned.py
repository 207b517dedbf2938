"""A plan: every site of an attachment, and the table that it prints as."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from condmod.attaching.sites import Placement
from condmod.bank import Bank
from condmod.build import create_encoder
from condmod.config import EncoderConfig, ModulatorConfig
from condmod.site import Site
from condmod.tables import text_table

Start = Literal["base", "published"]


@dataclass(frozen=True)
class PlannedSite:
    """One place of a model and what goes there.

    Attributes:
        module: the class of the module, for people to read.
        pattern: what named it.
        config: the modulator's options.
        placement: on what the module reads, on what it gives, around it, or on its weight.
        site: C, D, where the channels lie, and the module's dotted name.
        argument: the name of the argument that holds the features.
        item: which of several outputs holds the features.
    """

    module: str
    pattern: str
    config: ModulatorConfig
    placement: Placement
    site: Site
    argument: str
    item: int


class Counts(NamedTuple):
    """How many parameters an attachment has.

    Attributes:
        sites: at each site, by its name.
        shared: in what the sites of a pattern share, by the pattern.
        encoder: in the encoder.
    """

    sites: dict[str, int]
    shared: dict[str, int]
    encoder: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.sites.values()) + sum(self.shared.values()) + self.encoder


@dataclass(frozen=True)
class Plan:
    """Every site of an attachment; prints as a table.

    Attributes:
        sites: in the order of the patterns, and of the model.
        condition_dim: D, the width of the condition; None where every modulator has its encoder.
        encoder: turns raw signals into the condition, if there is one.
        start: whether the model starts as it was ("base") or each modulator as it was published.
        base_parameters: how many the model has.
    """

    sites: tuple[PlannedSite, ...]
    condition_dim: int | None
    encoder: EncoderConfig | None
    start: Start
    base_parameters: int

    @property
    def needs_condition(self) -> bool:
        """Whether some site takes a condition; else all read the features alone."""
        return any(planned.config.component.kinds != {"self"} for planned in self.sites)

    def groups(self) -> dict[str, list[PlannedSite]]:
        """The sites by pattern: those of one pattern share what their mechanism shares."""
        groups: dict[str, list[PlannedSite]] = {}
        for site in self.sites:
            groups.setdefault(site.pattern, []).append(site)
        return groups

    def parameters(self) -> Counts:
        """How many there are at each site, in what the sites of a pattern share, in the encoder."""
        sites: dict[str, int] = {}
        shared: dict[str, int] = {}
        encoder = 0
        with torch.device("meta"):
            for pattern, planned in self.groups().items():
                bank = build_bank(planned)
                sites |= {name: count(bank[name]) for name in bank}
                if bank.shared is not None:
                    shared[pattern] = count(bank.shared)
            if self.encoder is not None:
                encoder = count(create_encoder(self.encoder, self.condition_dim))
        return Counts(sites, shared, encoder)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        counts = self.parameters()
        return {
            "condition_dim": self.condition_dim,
            "encoder": None if self.encoder is None else str(self.encoder),
            "start": self.start,
            "base_parameters": self.base_parameters,
            "parameters": counts.total,
            "sites": [
                {
                    "name": planned.site.name,
                    "module": planned.module,
                    "pattern": planned.pattern,
                    "spec": str(planned.config),
                    "placement": planned.placement,
                    "features": planned.site.features,
                    "out_features": planned.site.out_features,
                    "channel_dim": planned.site.channel_dim,
                    "condition_dim": planned.site.condition_dim,
                    "argument": planned.argument,
                    "item": planned.item,
                    "parameters": counts.sites[planned.site.name],
                }
                for planned in self.sites
            ],
        }

    def __str__(self) -> str:
        counts = self.parameters()
        head = ("site", "module", "spec", "placement", "features", "channels", "parameters")
        alike: dict[tuple[str, ...], list[PlannedSite]] = {}
        for planned in self.sites:
            channels = "last" if planned.site.channel_dim == -1 else "dim 1"
            what = (planned.module, str(planned.config), str(planned.placement))
            gives = planned.site.out_features
            features = f"{planned.site.features}" + (f" to {gives}" if gives else "")
            sizes = (features, channels, str(counts.sites[planned.site.name]))
            shape = re.sub(r"(?<![^.])\d+(?![^.])", "*", planned.site.name)
            alike.setdefault((shape, *what, *sizes), []).append(planned)
        rows: list[tuple[str, ...]] = [
            (_ranges([p.site.name for p in sites]), *cells, _times(len(sites), int(number)))
            for (_, *cells, number), sites in alike.items()
        ]
        rows += [
            (pattern, "", "shared", "", "", "", f"{number:,}")
            for pattern, number in counts.shared.items()
        ]
        total = counts.total
        part = f" ({_part(total, self.base_parameters)})" if self.base_parameters else ""
        condition = f"condition_dim {self.condition_dim}"
        if self.condition_dim is None:
            own = "the modulators' own condition" if self.needs_condition else "no condition"
            condition = own
        numbers = {head.index("features"), head.index("parameters")}
        lines = text_table(head, rows, numbers)
        if self.encoder is not None:
            lines.append(f"encoder {self.encoder}, {counts.encoder:,} parameters")
        lines.append(f"{len(self.sites)} sites, {condition}, {total:,} parameters{part}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __iter__(self) -> Iterator[PlannedSite]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def build_bank(sites: list[PlannedSite]) -> Bank:
    """The modulators of the sites of one pattern."""
    return Bank(sites[0].config, {planned.site.name: planned.site for planned in sites})


def count(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _ranges(names: list[str]) -> str:
    """Names that differ in their numbers as one: blocks.0-11.norm1, or with stars and a count."""
    if len(names) == 1:
        return names[0]
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    varied = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    parts = [column[0] for column in columns]
    if len(varied) == 1:
        numbers = sorted(map(int, columns[varied[0]]))
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            parts[varied[0]] = f"{numbers[0]}-{numbers[-1]}"
            return ".".join(parts)
    for i in varied:
        parts[i] = "*"
    return f"{'.'.join(parts)} ({len(names)})"


def _times(number: int, each: int) -> str:
    return f"{each:,}" if number == 1 else f"{number} x {each:,}"


def _part(total: int, base: int) -> str:
    """How many parameters these are against the model's."""
    return (
        f"{total / base:.2%} of the model's"
        if total < base
        else f"{total / base:.1f} times the model's"
    )
