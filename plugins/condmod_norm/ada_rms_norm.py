"""Adaptive RMS norm of k-diffusion and x-transformers."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import (
    Scale,
    blank_linear,
    featurewise_scale,
    normalisation,
    reset_constant,
)


class AdaRMSNormConfig(condmod.ModulatorConfig):
    """Options of `ada_rms_norm`."""

    norm: Literal["rms", "layer"] = "rms"
    """RMS norm, or layer norm as in x-transformers' AdaptiveLayerNorm; neither has parameters."""
    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-6
    """Added to the mean square, or to the variance."""


class AdaRMSNorm(condmod.Modulator[AdaRMSNormConfig, Scale]):
    """AdaRMSNorm: y = (1 + scale)·RMS(x), with scale = W·c.

    No shift, no bias, and no activation before W.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; the norm
        is over the channels of each position.

    Init:
        weight 0, so y = RMS(x).

    Source:
        crowsonkb/k-diffusion models/image_transformer_v2.py (MIT), the model of Crowson et al.,
        Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion
        Transformers, 2024, arXiv:2401.11605; lucidrains/x-transformers x_transformers.py (MIT):
        AdaptiveRMSNorm, AdaptiveLayerNorm.
    """

    name = "ada_rms_norm"
    Config = AdaRMSNormConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: AdaRMSNormConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation(config.norm, site.features, site.channel_dim, eps=config.eps)
        self.proj = blank_linear(self.condition_dim, site.features, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter as at the start; nothing is random."""
        reset_constant(self.proj, (0,))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> Scale:
        """The projection's output as scale."""
        return Scale(projected)

    def modulate(self, x: Tensor, modulation: Scale) -> Tensor:
        """(1 + scale)·norm(x)."""
        dim = self.site.channel_dim
        return featurewise_scale(x, modulation.scale, dim, norm=self.norm, where=self.where)
