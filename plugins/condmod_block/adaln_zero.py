"""adaLN-Zero of DiT."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

import condmod
from condmod.functional import (
    ScaleShiftGate,
    blank_linear,
    featurewise_scale,
    gated_residual,
    gated_residual_affine,
    normalisation,
    reset_constant,
    same_shape,
)
from condmod_block._around import Eps, Parts, enter_normed, prepare_silu, unpack_parts


class AdaLNZeroConfig(condmod.ModulatorConfig):
    """Options of `adaln_zero`."""

    parts: Parts = 2
    """How many sublayers one projection serves; DiT has 2, attention and feed-forward."""
    norm: Literal["layer", "none"] = "layer"
    """LN as in DiT, or none where the sublayer has a norm in front already."""
    residual: bool = True
    """Add x as in DiT; False where what is around the sublayer does."""
    gate: Literal["linear", "one_plus"] = "linear"
    """How the gate is read: gate as in DiT, or 1 + gate, which leaves a branch open at 0."""
    eps: Eps = 1e-6
    """Added to the variance."""
    init: Literal["published", "identity"] = "published"
    """Zero as in DiT (every branch closed), or gates at 1 (x + f(norm(x)) at the start)."""


class AdaLNZero(condmod.SublayerModulator[AdaLNZeroConfig, ScaleShiftGate]):
    """adaLN-Zero: x + gate·f((1 + scale)·LN(x) + shift), around each of `parts` sublayers f.

    LN has no parameters. One projection W·silu(c) + b gives all parts, rows
    [shift, scale, gate] for each part in turn. Attached around a sublayer of a model that stays
    as it is, it is (1 + gate)·f((1 + scale)·x + shift), which starts as f(x).

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; LN is
        over the channels of each position.

    Init:
        published: weight and bias 0, so every block starts as y = x (with a gate of 1 + gate as
        x + f(LN(x))); in the first step only the gates get a gradient. identity: weight 0, gate
        1: y = x + f(LN(x)).

    Source:
        Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, arXiv:2212.09748.
    """

    name = "adaln_zero"
    Config = AdaLNZeroConfig
    kinds = frozenset({"global", "aligned", "rows"})
    prepare = prepare_silu
    unpack = unpack_parts
    generate = condmod.generate_linear
    enter = enter_normed

    def __init__(self, config: AdaLNZeroConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.parts = config.parts
        self.norm = (
            normalisation("layer", site.features, site.channel_dim, eps=config.eps)
            if config.norm == "layer"
            else None
        )
        self.proj = blank_linear(self.condition_dim, 3 * config.parts * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter as at the start; nothing is random."""
        opened = self.config.init == "identity" and self.config.gate == "linear"
        reset_constant(self.proj, (0, 0, opened) * self.parts)

    @classmethod
    def as_base(cls, config: AdaLNZeroConfig) -> Mapping[str, Any]:  # noqa: ARG003
        """No second norm, no second residual, and an open branch."""
        return {"norm": "none", "residual": False, "gate": "one_plus"}

    def exit(
        self,
        x: Tensor,
        y: Tensor,
        modulation: ScaleShiftGate,
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """The gated output of the sublayer, joined to x where there is a residual."""
        dim, form = self.site.channel_dim, self.config.gate
        if self.config.residual:
            return gated_residual(x, y, modulation.gate, dim, form=form, where=self.where)
        same_shape(x, y, self.where)
        scale: Literal["raw", "one_plus"] = "raw" if form == "linear" else "one_plus"
        return featurewise_scale(y, modulation.gate, dim, form=scale, where=self.where)

    def between(
        self,
        x: Tensor,
        y: Tensor,
        one: tuple[ScaleShiftGate, condmod.Sublayer | None],
        other: tuple[ScaleShiftGate, condmod.Sublayer | None],
    ) -> tuple[Tensor, Tensor]:
        """Gate, residual, norm and affine in one pass where a kernel can."""
        if not self.config.residual:
            return super().between(x, y, one, other)
        return gated_residual_affine(
            x,
            y,
            one[0].gate,
            (other[0].scale, other[0].shift),
            self.site.channel_dim,
            gate_form=self.config.gate,
            norm=self.norm,
            where=self.where,
        )
