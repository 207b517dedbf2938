"""AdaGN as in ADM's residual block."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import ScaleShift, blank_linear, featurewise_affine, in_layout_of


class AdaGroupNormConfig(condmod.ModulatorConfig):
    """Options of `ada_group_norm`."""

    groups: Annotated[int, Field(ge=1, le=65536)] = 32
    """Groups of channels; must divide the features."""
    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-5
    """Added to the variance."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default as in ADM, or y = GN(x) at the start."""


class AdaGroupNorm(condmod.Modulator[AdaGroupNormConfig, ScaleShift]):
    """AdaGN, ADM's form: y = (1 + scale)·GN(x) + shift, with (scale, shift) = W·silu(c) + b.

    GN is GroupNorm with its own learned affine; its statistics are over all positions of a
    sample and computed in float32 for half precision. Rows of W are [scale, shift].

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
    kinds = frozenset({"global", "aligned"})
    site_params = True

    def __init__(self, config: AdaGroupNormConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        if site.features % config.groups:
            fitting = [n for n in range(1, site.features + 1) if site.features % n == 0]
            raise condmod.SiteError(
                f"{self.where()}: groups={config.groups} does not divide "
                f"features={site.features}; choose groups from {fitting}"
            )
        self.norm = nn.GroupNorm(config.groups, site.features, eps=config.eps)
        self.proj = blank_linear(self.condition_dim, 2 * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.norm.reset_parameters()
        self.proj.reset_parameters()
        if self.config.init == "identity":
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return nn.functional.silu(self.accept(condition))

    def unpack(self, projected: Tensor) -> ScaleShift:
        """The projection's output as scale and shift."""
        return ScaleShift(*projected.chunk(2, dim=-1))

    def generate(self, condition: condmod.Condition) -> ScaleShift:
        """Scale and shift, each (B, C) or (B, *positions, C)."""
        return self.unpack(self.proj(self.prepare(condition)))

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """(1 + scale)·GN(x) + shift."""
        dim = self.site.channel_dim
        self.check_channels(x)
        normed = group_norm(x, self.norm, dim)
        return featurewise_affine(normed, modulation, dim, where=self.where)


def group_norm(x: Tensor, norm: nn.GroupNorm, channel_dim: int) -> Tensor:
    """GroupNorm over channels and positions, in float32 at least; shape and dtype of x."""
    weight, bias = norm.weight, norm.bias
    first = x if channel_dim == 1 else x.movedim(-1, 1)
    if torch.is_grad_enabled() and not x.requires_grad:
        # torch 2.13's CPU backward crashes on channels-last features that need no gradient
        first = first.contiguous()
    wide = torch.promote_types(x.dtype, torch.float32)
    out = nn.functional.group_norm(
        first.to(wide), norm.num_groups, weight.to(wide), bias.to(wide), norm.eps
    ).to(x.dtype)
    return out if channel_dim == 1 else in_layout_of(x, out.movedim(1, -1))
