"""AdaGN of k-diffusion."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import (
    ScaleShift,
    blank_linear,
    featurewise_affine,
    normalisation,
    reset_constant,
)


class AdaGroupNormKDiffusionConfig(condmod.ModulatorConfig):
    """Options of `ada_group_norm_k_diffusion`."""

    group_size: condmod.Width = 32
    """Channels in a group: max(1, C // group_size) groups, whose number must divide C."""
    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-5
    """Added to the variance."""


class AdaGroupNormKDiffusion(condmod.Modulator[AdaGroupNormKDiffusionConfig, ScaleShift]):
    """k-diffusion's AdaGN: y = (1 + scale)·GN(x) + shift, with (scale, shift) = W·c + b.

    GN has no parameters; its statistics are over all positions of a sample. Nothing activates
    the condition. Rows of W are [scale, shift].

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        weight and bias 0, so y = GN(x).

    Source:
        crowsonkb/k-diffusion k_diffusion/layers.py: AdaGN, and models/image_v1.py, which counts
        the groups by their size (MIT).
    """

    name = "ada_group_norm_k_diffusion"
    Config = AdaGroupNormKDiffusionConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: AdaGroupNormKDiffusionConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        channels = site.features
        groups = max(1, channels // config.group_size)
        if channels % groups:
            fitting = [size for size in range(1, channels + 1) if channels % size == 0]
            raise condmod.SiteError(
                f"{self.where()}: group_size={config.group_size} makes {groups} groups, which do "
                f"not divide features={channels}; choose group_size from {fitting}"
            )
        self.norm = normalisation(
            "group", channels, site.channel_dim, groups=groups, eps=config.eps
        )
        self.proj = blank_linear(self.condition_dim, 2 * channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter as at the start; nothing is random."""
        reset_constant(self.proj, (0,))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> ScaleShift:
        """The projection's output as scale and shift."""
        return ScaleShift(*projected.chunk(2, dim=-1))

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """(1 + scale)·GN(x) + shift."""
        dim = self.site.channel_dim
        return featurewise_affine(x, modulation, dim, norm=self.norm, where=self.where)
