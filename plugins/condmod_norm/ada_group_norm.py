"""AdaGN as in ADM's residual block."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import (
    ScaleShift,
    Shift,
    add_shift,
    blank_linear,
    featurewise_affine,
    in_layout_of,
    normalisation,
    reset_constant,
    widened,
)


class AdaGroupNormConfig(condmod.ModulatorConfig):
    """Options of `ada_group_norm`."""

    groups: Annotated[int, Field(ge=1, le=65536)] = 32
    """Groups of channels; must divide the features."""
    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-5
    """Added to the variance."""
    use_scale_shift_norm: bool = True
    """ADM's switch: False adds the projection before the norm, GN(x + W·silu(c) + b)."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default as in ADM, or y = GN(x) at the start."""


class AdaGroupNorm(condmod.Modulator[AdaGroupNormConfig, ScaleShift | Shift]):
    """AdaGN, ADM's form: y = (1 + scale)·GN(x) + shift, with (scale, shift) = W·silu(c) + b.

    GN is GroupNorm with its own learned affine; its statistics are over all positions of a
    sample and computed in float32 for half precision. Rows of W are [scale, shift], or those of
    a shift alone with use_scale_shift_norm=False.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        published: torch's Linear default, GN's affine at 1 and 0. identity: weight and bias 0.

    Source:
        Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021,
        arXiv:2105.05233, openai/guided-diffusion unet.py (MIT).
    """

    name = "ada_group_norm"
    Config = AdaGroupNormConfig
    kinds = frozenset({"global", "aligned", "rows"})
    site_params = True
    generate = condmod.generate_linear

    def __init__(self, config: AdaGroupNormConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation(
            "group",
            site.features,
            site.channel_dim,
            affine="both",
            groups=config.groups,
            eps=config.eps,
            where=self.where(),
        )
        chunks = 2 if config.use_scale_shift_norm else 1
        self.proj = blank_linear(self.condition_dim, chunks * site.features)
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

    def unpack(self, projected: Tensor) -> ScaleShift | Shift:
        """The projection's output as scale and shift, or as a shift."""
        if self.config.use_scale_shift_norm:
            return ScaleShift(*projected.chunk(2, dim=-1))
        return Shift(projected)

    def modulate(self, x: Tensor, modulation: ScaleShift | Shift) -> Tensor:
        """(1 + scale)·GN(x) + shift, or GN(x + shift)."""
        dim = self.site.channel_dim
        if isinstance(modulation, ScaleShift):
            return featurewise_affine(x, modulation, dim, norm=self.norm, where=self.where)
        h = add_shift(widened(x, None, self.where), modulation.shift, dim, where=self.where)
        return in_layout_of(x, widened(h, self.norm, self.where).to(x.dtype))
