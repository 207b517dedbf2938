"""What the mechanisms share that add a path of low rank to what a sublayer gives."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

import condmod

Rank = Annotated[int, Field(ge=1, le=4096)]
Alpha = Annotated[float, Field(gt=0.0, le=65536.0)]


def width(site: condmod.Site) -> int:
    """How many channels the sublayer of a site gives."""
    return site.out_features or site.features


def enter_as_it_is(
    self: condmod.Component[Any, Any],
    x: Tensor,
    modulation: Any,  # noqa: ARG001
    sublayer: condmod.Sublayer | None,  # noqa: ARG001
) -> Tensor:
    """The features as they are."""
    self.check_channels(x)
    return x


def beside(
    self: condmod.Component[Any, Any], x: Tensor, y: Tensor, path: Tensor, scale: float
) -> Tensor:
    """Y + scale·path, rounded once.

    Raises:
        ShapeError: the sublayer has changed the positions, or gives another width.
    """
    if not isinstance(y, Tensor) or y.shape != path.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise condmod.ShapeError(
            f"{self.where()} adds {tuple(path.shape)} to what its sublayer makes of features "
            f"{tuple(x.shape)}; the sublayer gave {got}: it acts at each position, and "
            f"Site.out_features says how many features it gives"
        )
    return torch.add(y, path, alpha=scale).to(y.dtype)
