"""The zero convolution of ControlNet."""

from torch import Tensor

import condmod
from condmod.functional import Shift, add_shift, blank_linear, reset_constant


class ZeroConvConfig(condmod.ModulatorConfig):
    """`zero_conv` has no options."""


class ZeroConv(condmod.Modulator[ZeroConvConfig, Shift]):
    """Zero convolution: y = x + W·c + b, a 1x1 convolution of control features c from zero.

    c is what a second network, often a trainable copy of the first one's encoder, has at the same
    place: it has a vector for each position of x.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 3; condition aligned to x, of any width.

    Init:
        weight and bias 0, so y = x; in the first step W and b get a gradient, and c gets one when
        W has moved.

    Source:
        Zhang, Rao and Agrawala, Adding Conditional Control to Text-to-Image Diffusion Models,
        2023, arXiv:2302.05543, lllyasviel/ControlNet (Apache-2.0); huggingface/diffusers
        models/controlnets (Apache-2.0).
    """

    name = "zero_conv"
    Config = ZeroConvConfig
    kinds = frozenset({"aligned"})
    generate = condmod.generate_linear

    def __init__(self, config: ZeroConvConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.proj = blank_linear(self.condition_dim, site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and bias to 0; nothing is random."""
        reset_constant(self.proj, (0,))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> Shift:
        """The projection's output as a shift."""
        return Shift(projected)

    def modulate(self, x: Tensor, modulation: Shift) -> Tensor:
        """The features plus the shift."""
        return add_shift(x, modulation.shift, self.site.channel_dim, where=self.where)
