"""Additive conditioning."""

from typing import Literal

from torch import Tensor

import condmod
from condmod.functional import (
    Activation,
    Shift,
    activation,
    add_shift,
    blank_linear,
    reset_constant,
)


class AddConfig(condmod.ModulatorConfig):
    """Options of `add`."""

    activation: Activation = "none"
    """Activation before the projection; residual blocks of diffusion UNets use silu."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default, or y = x at the start."""


class Add(condmod.Modulator[AddConfig, Shift]):
    """Addition: y = x + W·act(c) + b.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        published: torch's Linear default (not the identity). identity: weight and bias 0.

    Source:
        Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239, where the
        timestep embedding is added to the features of every residual block.
    """

    name = "add"
    Config = AddConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: AddConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.activation = activation(config.activation)
        self.proj = blank_linear(self.condition_dim, site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.proj.reset_parameters()
        if self.config.init == "identity":
            reset_constant(self.proj, (0,))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        prepared: Tensor = self.activation(self.accept(condition))
        return prepared

    def unpack(self, projected: Tensor) -> Shift:
        """The projection's output as a shift."""
        return Shift(projected)

    def modulate(self, x: Tensor, modulation: Shift) -> Tensor:
        """The features plus the shift."""
        return add_shift(x, modulation.shift, self.site.channel_dim, where=self.where)
