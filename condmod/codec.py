"""How a published checkpoint lays out a component's parameters, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Shares: TypeAlias = "Mapping[str, Sequence[str]]"
"""Keys of a state dict, each with the names of the equal shares of its rows, in order."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The same rows, here by our keys and there by a source's; both name the same shares."""

    ours: Shares
    theirs: Shares


LayoutsOf: TypeAlias = "Callable[[Any], Sequence[Layout]]"


@dataclass(frozen=True, slots=True)
class Codec:
    """A component's parameters as one source lays them out.

    Attributes:
        component: the component's name.
        source: what `convert` calls it, as in "dit".
        layout: from the component's config to the layouts of its parameters. Of a bank, the
            source's keys begin with the name of the site.
        joined: the same for parameters that the source keeps once for all sites, the rows of one
            site after those of the other.
        shared: the same for what the sites of a bank share.
        beside: in a model the source keeps them in the module that holds the component, and has
            no module in its place.
        requires: options that the source's formula fixes, with their values.
    """

    component: str
    source: str
    layout: LayoutsOf = field(default=lambda _: ())
    joined: LayoutsOf = field(default=lambda _: ())
    shared: LayoutsOf = field(default=lambda _: ())
    beside: bool = False
    requires: Mapping[str, Any] = field(default_factory=dict)


def same(ours: str, theirs: str) -> Layout:
    """A parameter that both keep alike."""
    return Layout({ours: ("all",)}, {theirs: ("all",)})


def linear(ours: Shares, theirs: Shares, *, bias: bool = True) -> list[Layout]:
    """Linears by the names of their modules: a layout for the weight, and one for the bias.

    Args:
        ours: as in {"proj": ("scale", "shift")}.
        theirs: as in {"fc_gamma": ("scale",), "fc_beta": ("shift",)}.
        bias: whether they have one.
    """
    return [
        Layout(*({f"{name}.{leaf}": shares for name, shares in side.items()} for side in both))
        for both in [(ours, theirs)]
        for leaf in (("weight", "bias") if bias else ("weight",))
    ]
