"""What the mechanisms of this package share: a norm and an affine in front, a gate behind."""

from collections.abc import Callable
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import (
    Pass,
    ScaleShiftGate,
    blank_linear,
    featurewise_affine,
    fill,
    gated_residual,
    gated_residual_affine,
    reset_constant,
)

Eps = Annotated[float, Field(gt=0.0, le=0.1)]
Parts = Annotated[int, Field(ge=1, le=16)]


class Normed(Protocol):
    """A modulator with one norm for all its parts."""

    norm: Pass | None
    site: condmod.Site

    def where(self) -> str:
        """What errors call it."""


class Parted(Protocol):
    """A modulator that serves several sublayers."""

    parts: int


def enter_normed(
    self: Normed,
    x: Tensor,
    modulation: ScaleShiftGate,
    sublayer: condmod.Sublayer | None,  # noqa: ARG001
) -> Tensor:
    """(1 + scale)·norm(x) + shift."""
    affine, dim = (modulation.scale, modulation.shift), self.site.channel_dim
    return featurewise_affine(x, affine, dim, norm=self.norm, where=self.where)


def exit_gated(
    self: Normed,
    x: Tensor,
    y: Tensor,
    modulation: ScaleShiftGate,
    sublayer: condmod.Sublayer | None,  # noqa: ARG001
) -> Tensor:
    """X plus the gated output of the sublayer."""
    return gated_residual(x, y, modulation.gate, self.site.channel_dim, where=self.where)


def between_gated(
    self: Normed,
    x: Tensor,
    y: Tensor,
    one: tuple[ScaleShiftGate, condmod.Sublayer | None],
    other: tuple[ScaleShiftGate, condmod.Sublayer | None],
) -> tuple[Tensor, Tensor]:
    """X plus the gated output, and that normed and modulated, in one pass where a kernel can."""
    affine, dim = (other[0].scale, other[0].shift), self.site.channel_dim
    return gated_residual_affine(x, y, one[0].gate, affine, dim, norm=self.norm, where=self.where)


def prepare_silu(self: condmod.Component[Any, Any], condition: condmod.Condition) -> Tensor:
    """silu(c), which the projection reads."""
    return nn.functional.silu(self.accept(condition))


def unpack_parts(self: Parted, projected: Tensor) -> tuple[ScaleShiftGate, ...]:
    """The projection's output as one modulation for each part."""
    return split(projected, self.parts)


def split(rows: Tensor, parts: int) -> tuple[ScaleShiftGate, ...]:
    """Rows [shift, scale, gate] for each part in turn, (B, ..., 3·parts·C), as modulations."""
    chunks = rows.chunk(3 * parts, dim=-1)
    return tuple(
        ScaleShiftGate(scale=scale, shift=shift, gate=gate)
        for shift, scale, gate in zip(chunks[0::3], chunks[1::3], chunks[2::3], strict=True)
    )


class Trunk(nn.Module):
    """W·silu(c) + b, which a bank runs once for all its sites.

    Args:
        condition_dim: D.
        rows: how wide its output is.
        draw: draws the Linear's parameters.
        bias: whether there is b.
    """

    def __init__(
        self,
        condition_dim: int,
        rows: int,
        draw: Callable[[nn.Linear], None],
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.proj = blank_linear(condition_dim, rows, bias=bias)
        self.draw = draw
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.draw(self.proj)

    def forward(self, condition: Tensor) -> Tensor:
        """(B, ..., D) to (B, ..., rows)."""
        projected: Tensor = self.proj(nn.functional.silu(condition))
        return projected


def widened_sum(one: Tensor, other: Tensor) -> Tensor:
    """The sum, in float32 at least, so that a small term is not lost beside a large one."""
    wide = torch.promote_types(one.dtype, torch.float32)
    return one.to(wide) + other.to(wide)


def closed(layer: nn.Linear) -> None:
    """Set a trunk to give 0."""
    reset_constant(layer, (0,))


def reset_table(table: Tensor, *, identity: bool) -> None:
    """Draw a table (..., 3·parts, C) from N(0, 1)/√C, or set its gates to 1 and the rest to 0."""
    chunks, features = table.shape[-2:]
    if identity:
        chunk = torch.arange(chunks, device=table.device)
        fill(table, (chunk % 3 == 2).to(table.dtype)[:, None].expand(table.shape))
    else:
        nn.init.normal_(table, std=features**-0.5)
