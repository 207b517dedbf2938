"""The place that a modulator fills, and the condition that comes to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from condmod.errors import SiteError


class Signal(NamedTuple):
    """A condition with what belongs to it; B batch, S tokens, T positions.

    Attributes:
        value: the condition itself, (B, ...); a mapping of names where an encoder takes several.
        mask: (B, S) or (B, T) bool, True where a token or position is real.
        present: (B,) bool, False for samples whose condition is absent.
        index: (B, ...) integer, the row of `value` that each position uses (kind `rows`).
    """

    value: Any
    mask: Tensor | None = None
    present: Tensor | None = None
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index


class Shared(NamedTuple):
    """What the parameters that a bank's sites share made of a condition."""

    value: Any


# None where a modulator reads the features alone (kind `self`).
Condition: TypeAlias = "Tensor | Signal | Mapping[str, Tensor | Signal] | None"


@dataclass(frozen=True, slots=True)
class Site:
    """The place that a modulator fills.

    Attributes:
        features: C, the number of channels of the features.
        condition_dim: D, the width of the condition; None where the modulator owns its encoder.
        channel_dim: -1 for (B, ..., C), 1 for (B, C, ...).
        out_features: channels that come out, where a sublayer changes their number.
        name: what errors call this place, such as "blocks.3.norm1".
    """

    features: int
    condition_dim: int | None = None
    channel_dim: int = -1
    out_features: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("features", "condition_dim", "out_features"):
            value = getattr(self, field)
            if value is None and field != "features":
                continue
            if type(value) is not int or value < 1:
                raise SiteError(f"Site.{field} is a positive integer; got {value!r}")
        if self.channel_dim not in (1, -1):
            raise SiteError(
                "Site.channel_dim is -1 for (B, ..., C) or 1 for (B, C, ...); "
                f"got {self.channel_dim!r}"
            )


def one_size(name: str, sites: Sequence[Site]) -> tuple[int, int]:
    """D and C of sites that share a trunk.

    Args:
        name: the component that has the trunk.
        sites: where.

    Raises:
        SiteError: a site has no condition_dim, or two sites differ.
    """
    first = sites[0]
    for site in sites:
        if site.condition_dim is None:
            place = f" at {site.name!r}" if site.name else ""
            raise SiteError(f"{name}{place} needs condition_dim, the width of its condition")
        for field in ("condition_dim", "features"):
            one, other = getattr(first, field), getattr(site, field)
            if one != other:
                raise SiteError(
                    f"{name} has one trunk for all sites of a bank, whose {field} are thus equal; "
                    f"got {one} at {first.name!r} and {other} at {site.name!r}: make a bank for "
                    "each size"
                )
    assert first.condition_dim is not None
    return first.condition_dim, first.features


def is_bool(value: Any, shape: Sequence[int]) -> bool:
    """Whether a mask or a presence is a bool tensor of this shape."""
    return (
        isinstance(value, Tensor) and value.dtype == torch.bool and tuple(value.shape) == (*shape,)
    )
