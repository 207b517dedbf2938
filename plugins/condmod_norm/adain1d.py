"""AdaIN1d of StyleTTS 2."""

from typing import Annotated, Literal

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


class AdaIN1dConfig(condmod.ModulatorConfig):
    """Options of `adain1d`."""

    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-5
    """Added to the variance."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default as in StyleTTS 2, or y = IN(x) at the start."""


class AdaIN1d(condmod.Modulator[AdaIN1dConfig, ScaleShift]):
    """AdaIN1d: y = (1 + γ)·IN(x) + β, with (γ, β) = W·c + b of a style vector c.

    IN is InstanceNorm without parameters: over all positions of each channel of a sample. Rows
    of W are [scale, shift]. Its name is the published one; it takes any number of dims.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 3, of more than one position; condition
        (B, D) or aligned to x.

    Init:
        published: torch's Linear default. identity: weight and bias 0.

    Source:
        Li et al., StyleTTS 2, 2023, arXiv:2306.07691, yl4579/StyleTTS2 Modules/hifigan.py (MIT).
    """

    name = "adain1d"
    Config = AdaIN1dConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: AdaIN1dConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation("instance", site.features, site.channel_dim, eps=config.eps)
        self.proj = blank_linear(self.condition_dim, 2 * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.proj.reset_parameters()
        if self.config.init == "identity":
            reset_constant(self.proj, (0, 0))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> ScaleShift:
        """The projection's output as scale and shift."""
        return ScaleShift(*projected.chunk(2, dim=-1))

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """(1 + γ)·IN(x) + β."""
        dim = self.site.channel_dim
        return featurewise_affine(x, modulation, dim, norm=self.norm, where=self.where)
