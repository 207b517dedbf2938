"""A map of any resolution at the features' own."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

import condmod
from condmod.functional import in_layout_of

_SIDES = 3  # as many as torch resizes


def resized(x: Tensor, held: Tensor, channel_dim: int, where: Callable[[], str]) -> Tensor:
    """A map (B, *sides, D) at the sides of x by the nearest of its positions, in the layout of x.

    Raises:
        ShapeError: it has another batch or number of sides than x, or x has none or an empty one.
    """
    sides = x.movedim(channel_dim, -1).shape[1:-1] if x.ndim > 1 else ()
    if (
        not 1 <= len(sides) <= _SIDES
        or held.ndim != x.ndim
        or held.shape[0] != x.shape[0]
        or 0 in sides
    ):
        raise condmod.ShapeError(
            f"{where()} resizes its map to the features' sides, of which both have equally many, "
            f"1 to {_SIDES} and none empty, in batches of one size; got features {tuple(x.shape)} "
            f"and a map (channels last) {tuple(held.shape)}"
        )
    first = held.movedim(-1, 1)
    large = first if first.shape[2:] == sides else F.interpolate(first, sides, mode="nearest")
    return in_layout_of(x, large.movedim(1, channel_dim))
