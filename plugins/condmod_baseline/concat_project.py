"""Concatenation along the channels, followed by a projection."""

from typing import Literal

import torch
from torch import Tensor, nn

import condmod
from condmod.functional import Shift, add_shift, blank_linear, fill


class ConcatProjectConfig(condmod.ModulatorConfig):
    """Options of `concat_project`."""

    init: Literal["published", "identity"] = "published"
    """Torch's Linear default, or y = x at the start."""


class ConcatProject(condmod.Modulator[ConcatProjectConfig, Shift]):
    """Channel concatenation and projection: y = W·[x, c] + b, at every position.

    Computed as W_x·x + (W_c·c + b), which never repeats a global condition over the positions;
    W is one matrix (C, C + D), columns [x, c]. Both halves read the weight of `proj`, whose own
    forward is not called.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        published: torch's default for the one Linear(C + D, C). identity: W_x = I, W_c = 0,
        b = 0.

    Source:
        conditioning by concatenation as in Mirza and Osindero, Conditional Generative
        Adversarial Nets, 2014, arXiv:1411.1784.
    """

    name = "concat_project"
    Config = ConcatProjectConfig
    kinds = frozenset({"global", "aligned"})
    site_params = True

    def __init__(self, config: ConcatProjectConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.proj = blank_linear(site.features + self.condition_dim, site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.proj.reset_parameters()
        if self.config.init == "identity":
            nn.init.zeros_(self.proj.bias)
            fill(self.proj.weight, torch.eye(*self.proj.weight.shape))

    def generate(self, condition: condmod.Condition) -> Shift:
        """The condition's part W_c·c + b, (B, C) or (B, *positions, C)."""
        weight = self.proj.weight[:, self.site.features :]
        return Shift(nn.functional.linear(self.accept(condition), weight, self.proj.bias))

    def modulate(self, x: Tensor, modulation: Shift) -> Tensor:
        """The features' part W_x·x, plus the shift."""
        weight = self.proj.weight[:, : self.site.features].to(x.dtype)
        dim = self.site.channel_dim
        self.check_channels(x)
        if dim == 1 and x.ndim > 2:
            projected = (weight @ x.flatten(2)).reshape(x.shape)
        else:
            projected = nn.functional.linear(x, weight)
        return add_shift(projected.to(x.dtype), modulation.shift, dim, where=self.where)
