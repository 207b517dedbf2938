"""Gated pointwise convolutional modulation."""

from typing import NamedTuple

import torch
from torch import Tensor

import condmod
from condmod.functional import blank_linear, in_layout_of, widened


class GPoCMConfig(condmod.ModulatorConfig):
    """`gpocm` has no options."""


class Mix(NamedTuple):
    """A product of the channels for each sample: mix (B, C, C), from and to, and shift (B, C)."""

    mix: Tensor
    shift: Tensor


class GPoCM(condmod.Modulator[GPoCMConfig, Mix]):
    """GPoCM: y = x·σ(x·Γ(c) + β(c)), with a matrix Γ (C, C) of its own for each sample.

    Γ mixes the channels of each position, (x·Γ)_j = Σ_i x_i·Γ_ij, and what it gives gates the
    features. Rows of W in W·c + b are [Γ, β], Γ by the channel that it reads; the condition is
    not activated.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D).

    Init:
        torch's Linear default. Not the identity, and no start is: a sigmoid never is 1.

    Source:
        Choi et al., LaSAFT: Latent Source Attentive Frequency Transformation for Conditioned
        Source Separation, 2020, arXiv:2010.11631, ws-choi/Conditioned-Source-Separation-LaSAFT
        lasaft/source_separation/conditioned/cunet/dcun_gpocm.py (MIT).
    """

    name = "gpocm"
    Config = GPoCMConfig
    kinds = frozenset({"global"})
    generate = condmod.generate_linear

    def __init__(self, config: GPoCMConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.proj = blank_linear(self.condition_dim, site.features * (site.features + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.proj.reset_parameters()

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> Mix:
        """The projection's output as a matrix and a shift for each sample."""
        channels = self.site.features
        mix, shift = torch.split(projected, [channels**2, channels], -1)
        return Mix(torch.unflatten(mix, -1, (channels, channels)), shift)

    def modulate(self, x: Tensor, modulation: Mix) -> Tensor:
        """x·σ(x·Γ + β)."""
        self.check_channels(x)
        h = widened(x, None, self.where)
        mix, shift = (part.to(h.dtype) for part in modulation)
        channels = self.site.features
        if mix.shape != (x.shape[0], channels, channels) or shift.shape != (x.shape[0], channels):
            raise condmod.ShapeError(
                f"modulation {tuple(mix.shape)} and {tuple(shift.shape)} does not fit features "
                f"{tuple(x.shape)} in {self.where()}; for each sample it has a matrix (C, C) and "
                "a shift (C,)"
            )
        if self.site.channel_dim == -1:
            mixed = torch.baddbmm(shift[:, None], h.reshape(x.shape[0], -1, channels), mix)
        else:
            flat = h.reshape(x.shape[0], channels, -1)
            mixed = torch.baddbmm(shift[..., None], mix.transpose(1, 2), flat)
        return in_layout_of(x, (h * mixed.view_as(h).sigmoid()).to(x.dtype))
