"""adaLN-Zero of DiT."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import (
    ScaleShiftGate,
    blank_linear,
    featurewise_affine,
    fill,
    gated_residual,
    layer_norm,
)


class AdaLNZeroConfig(condmod.ModulatorConfig):
    """Options of `adaln_zero`."""

    parts: Annotated[int, Field(ge=1, le=16)] = 2
    """How many sublayers one projection serves; DiT has 2, attention and feed-forward."""
    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-6
    """Added to the variance."""
    init: Literal["published", "identity"] = "published"
    """Zero as in DiT (every branch closed), or gates at 1 (x + f(norm(x)) at the start)."""


class AdaLNZero(condmod.SublayerModulator[AdaLNZeroConfig, ScaleShiftGate]):
    """adaLN-Zero: x + gate·f((1 + scale)·LN(x) + shift), around each of `parts` sublayers f.

    LN has no parameters. One projection W·silu(c) + b gives all parts, rows
    [shift, scale, gate] for each part in turn.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; LN is
        over the channels of each position.

    Init:
        published: weight and bias 0, so every block starts as y = x; in the first step only the
        gates get a gradient. identity: weight 0, gate 1: y = x + f(LN(x)).

    Source:
        Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, arXiv:2212.09748.
    """

    name = "adaln_zero"
    Config = AdaLNZeroConfig
    kinds = frozenset({"global", "aligned"})

    def __init__(self, config: AdaLNZeroConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.parts = config.parts
        self.proj = blank_linear(self.condition_dim, 3 * config.parts * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter as at the start; nothing is random."""
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        if self.config.init == "identity":
            start = torch.zeros(self.parts, 3, self.site.features)
            start[:, 2] = 1.0
            fill(self.proj.bias, start.flatten())

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return nn.functional.silu(self.accept(condition))

    def unpack(self, projected: Tensor) -> tuple[ScaleShiftGate, ...]:
        """The projection's output as one modulation for each part."""
        chunks = projected.chunk(3 * self.parts, dim=-1)
        return tuple(
            ScaleShiftGate(scale=scale, shift=shift, gate=gate)
            for shift, scale, gate in zip(chunks[0::3], chunks[1::3], chunks[2::3], strict=True)
        )

    def generate(self, condition: condmod.Condition) -> tuple[ScaleShiftGate, ...]:
        """One modulation for each part, leaves (B, C) or (B, *positions, C)."""
        return self.unpack(self.proj(self.prepare(condition)))

    def enter(
        self,
        x: Tensor,
        modulation: ScaleShiftGate,
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """(1 + scale)·LN(x) + shift."""
        dim = self.site.channel_dim
        affine = (modulation.scale, modulation.shift)
        return featurewise_affine(
            layer_norm(x, dim, self.config.eps), affine, dim, where=self.where
        )

    def exit(
        self,
        x: Tensor,
        y: Tensor,
        modulation: ScaleShiftGate,
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """X plus the gated output of the sublayer."""
        return gated_residual(x, y, modulation.gate, self.site.channel_dim, where=self.where)
