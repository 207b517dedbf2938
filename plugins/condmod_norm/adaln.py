"""Adaptive layer norm, as at the end of DiT and in diffusers."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import (
    Affine,
    Scale,
    ScaleShift,
    blank_linear,
    featurewise_affine,
    featurewise_scale,
    normalisation,
    reset_constant,
)


class AdaLNConfig(condmod.ModulatorConfig):
    """Options of `adaln`."""

    order: Literal["shift_scale", "scale_shift", "scale"] = "shift_scale"
    """Rows of W: as DiT, as diffusers' AdaLayerNormContinuous, or no shift at all as Lumina."""
    norm: Literal["layer", "rms"] = "layer"
    """Layer norm, or RMS norm."""
    affine: bool = False
    """Give the norm a learned weight, and a layer norm a bias too where `bias` allows it."""
    bias: bool = True
    """Give W, and an affine layer norm, a bias."""
    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-6
    """Added to the variance, or to the mean square."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default as in diffusers, or y = norm(x) at the start as DiT's last layer."""


class AdaLN(condmod.Modulator[AdaLNConfig, ScaleShift | Scale]):
    """adaLN: y = (1 + scale)·LN(x) + shift, with (shift, scale) = W·silu(c) + b.

    Rows of W are [shift, scale], [scale, shift], or [scale] alone with y = (1 + scale)·LN(x).

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; the norm
        is over the channels of each position.

    Init:
        published: torch's Linear default, the norm's affine at 1 and 0. identity: weight and
        bias 0, as DiT starts its last layer.

    Source:
        Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, arXiv:2212.09748;
        huggingface/diffusers models/normalization.py (Apache-2.0): AdaLayerNorm,
        AdaLayerNormContinuous, LuminaLayerNormContinuous.
    """

    name = "adaln"
    Config = AdaLNConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: AdaLNConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.site_params = config.affine
        parameters: Affine = "none"
        if config.affine:
            parameters = "both" if config.bias and config.norm == "layer" else "weight"
        self.norm = normalisation(
            config.norm, site.features, site.channel_dim, affine=parameters, eps=config.eps
        )
        parts = 1 if config.order == "scale" else 2
        self.proj = blank_linear(self.condition_dim, parts * site.features, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.norm.reset_parameters()
        self.proj.reset_parameters()
        if self.config.init == "identity":
            reset_constant(self.proj, (0,))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return nn.functional.silu(self.accept(condition))

    def unpack(self, projected: Tensor) -> ScaleShift | Scale:
        """The projection's output as scale and shift, or as scale alone."""
        if self.config.order == "scale":
            return Scale(projected)
        first, second = projected.chunk(2, dim=-1)
        if self.config.order == "scale_shift":
            return ScaleShift(scale=first, shift=second)
        return ScaleShift(scale=second, shift=first)

    def modulate(self, x: Tensor, modulation: ScaleShift | Scale) -> Tensor:
        """(1 + scale)·norm(x), and a shift where there is one."""
        dim = self.site.channel_dim
        if isinstance(modulation, Scale):
            return featurewise_scale(x, modulation.scale, dim, norm=self.norm, where=self.where)
        return featurewise_affine(x, modulation, dim, norm=self.norm, where=self.where)
