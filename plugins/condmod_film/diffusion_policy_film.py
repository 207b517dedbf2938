"""FiLM of Diffusion Policy."""

from typing import Literal

from torch import Tensor, nn

import condmod
from condmod.functional import (
    ScaleShift,
    Shift,
    add_shift,
    blank_linear,
    featurewise_affine,
    reset_constant,
)


class DiffusionPolicyFilmConfig(condmod.ModulatorConfig):
    """Options of `diffusion_policy_film`."""

    cond_predict_scale: bool = False
    """Scale and shift, s·x + t, instead of the shift alone."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default as published, or y = x at the start."""


class DiffusionPolicyFilm(condmod.Modulator[DiffusionPolicyFilmConfig, Shift | ScaleShift]):
    """Diffusion Policy's FiLM: y = x + W·mish(c) + b, or s·x + t with (s, t) = W·mish(c) + b.

    The second where `cond_predict_scale`. The scale is raw; rows of W are then [scale, shift].

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        published: torch's Linear default (not the identity). identity: weight 0 and the bias that
        makes y = x.

    Source:
        Chi et al., Diffusion Policy: Visuomotor Policy Learning via Action Diffusion, 2023,
        arXiv:2303.04137, real-stanford/diffusion_policy model/diffusion/conditional_unet1d.py
        (MIT).
    """

    name = "diffusion_policy_film"
    Config = DiffusionPolicyFilmConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: DiffusionPolicyFilmConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        leaves = 2 if config.cond_predict_scale else 1
        self.proj = blank_linear(self.condition_dim, leaves * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.proj.reset_parameters()
        if self.config.init == "identity":
            reset_constant(self.proj, (1, 0) if self.config.cond_predict_scale else (0,))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return nn.functional.mish(self.accept(condition))

    def unpack(self, projected: Tensor) -> Shift | ScaleShift:
        """The projection's output as a shift, or as scale and shift."""
        if not self.config.cond_predict_scale:
            return Shift(projected)
        return ScaleShift(*projected.chunk(2, dim=-1))

    def modulate(self, x: Tensor, modulation: Shift | ScaleShift) -> Tensor:
        """X + t, or s·x + t."""
        dim = self.site.channel_dim
        if isinstance(modulation, Shift):
            return add_shift(x, modulation.shift, dim, where=self.where)
        return featurewise_affine(x, modulation, dim, form="raw", where=self.where)
