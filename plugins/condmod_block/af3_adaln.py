"""AlphaFold 3's adaptive layer norm and output gate."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import (
    ScaleShiftGate,
    blank_linear,
    featurewise_affine,
    gated_residual,
    normalisation,
    reset_constant,
)
from condmod_block._around import Eps


class Af3AdaLNConfig(condmod.ModulatorConfig):
    """Options of `af3_adaln`."""

    gate_bias: Annotated[float, Field(ge=-20.0, le=20.0)] = -2.0
    """Where the gate's bias starts; σ(-2) is about 0.12."""
    eps: Eps = 1e-5
    """Added to both variances."""


class Af3AdaLN(condmod.SublayerModulator[Af3AdaLNConfig, ScaleShiftGate]):
    """AlphaFold 3's AdaLN: x + σ(gate)·f(σ(scale)·LN(x) + shift), around one sublayer f.

    Scale and shift come from the normed condition, scale = W·LN(c) + b and shift = W·LN(c), the
    gate from the condition itself, gate = W·c + b. LN of the features has no parameters, LN of
    the condition a weight and no bias.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition aligned to x, as AlphaFold's
        single representation, or (B, D); both norms are over the channels of each position.

    Init:
        the gate's weight 0 and bias -2, torch's Linear default for scale and shift, LN's weight
        1. A scale or gate of 1 is out of a sigmoid's reach.

    Source:
        Abramson et al., Accurate structure prediction of biomolecular interactions with
        AlphaFold 3, 2024, algorithms 25 and 26; lucidrains/alphafold3-pytorch alphafold3.py
        (MIT): ConditionWrapper, AdaptiveLayerNorm.
    """

    name = "af3_adaln"
    Config = Af3AdaLNConfig
    kinds = frozenset({"global", "aligned", "rows"})

    def __init__(self, config: Af3AdaLNConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        width, channels = self.condition_dim, site.features
        self.norm = normalisation("layer", channels, site.channel_dim, eps=config.eps)
        self.condition_norm = normalisation("layer", width, affine="weight", eps=config.eps)
        self.scale = blank_linear(width, channels)
        self.shift = blank_linear(width, channels, bias=False)
        self.gate = blank_linear(width, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.condition_norm.reset_parameters()
        self.scale.reset_parameters()
        self.shift.reset_parameters()
        reset_constant(self.gate, (self.config.gate_bias,))

    def generate(self, condition: condmod.Condition) -> tuple[ScaleShiftGate]:
        """The one part's modulation, leaves (B, C) or (B, *positions, C)."""
        c = self.accept(condition)
        normed = self.condition_norm(c)
        part = ScaleShiftGate(self.scale(normed), self.shift(normed), self.gate(c))
        return condmod.indexed((part,), condition)

    def enter(
        self,
        x: Tensor,
        modulation: ScaleShiftGate,
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """σ(scale)·LN(x) + shift."""
        affine, dim = (modulation.scale, modulation.shift), self.site.channel_dim
        return featurewise_affine(x, affine, dim, form="sigmoid", norm=self.norm, where=self.where)

    def exit(
        self,
        x: Tensor,
        y: Tensor,
        modulation: ScaleShiftGate,
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """X plus σ(gate) times the output of the sublayer."""
        dim = self.site.channel_dim
        return gated_residual(x, y, modulation.gate, dim, form="sigmoid", where=self.where)
