"""AdaIN of Huang and Belongie."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import ScaleShift, align, featurewise_affine


class AdaINConfig(condmod.ModulatorConfig):
    """Options of `adain`."""

    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-5
    """Added to both variances."""


class AdaIN(condmod.Modulator[AdaINConfig, ScaleShift]):
    """AdaIN: y = σ_s·(x - μ_x)/σ_x + μ_s, the mean and spread of x replaced by those of a style.

    μ and σ are over the positions of each channel of a sample; variances are unbiased, and eps
    is added to each. The condition is the style's feature map, whose mean and spread are the
    modulation. There is nothing to learn.

    Shapes:
        x (B, C, ...) with a style (B, C, ...), or x (B, ..., C) with a style (B, ..., C); each
        of any resolution and rank from 3, of more than one position; condition_dim is C.

    Init:
        It has no parameters. A style equal to x gives x back.

    Source:
        Huang and Belongie, Arbitrary Style Transfer in Real-time with Adaptive Instance
        Normalization, 2017, arXiv:1703.06868; naoto0804/pytorch-AdaIN function.py (MIT).
    """

    name = "adain"
    Config = AdaINConfig
    kinds = frozenset({"map"})

    def __init__(self, config: AdaINConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        if self.condition_dim != site.features:
            raise condmod.SiteError(
                f"{self.where()} takes the mean and spread of each channel from the style's: "
                f"condition_dim equals features; got features={site.features} and "
                f"condition_dim={self.condition_dim}"
            )

    def reset_parameters(self) -> None:
        """Nothing to draw."""

    def generate(self, condition: condmod.Condition) -> ScaleShift:
        """The style's spread and mean, each (B, C), in float32 for half precision."""
        style = self.accept_map(condition)
        if self._positions(style) < 2:
            raise condmod.ShapeError(
                f"{self.where()} takes the spread of a style over more than one position; got a "
                f"condition {tuple(style.shape)}"
            )
        mean, spread = self._statistics(style.to(torch.promote_types(style.dtype, torch.float32)))
        return ScaleShift(scale=spread, shift=mean)

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """σ_s·(x - μ_x)/σ_x + μ_s."""
        dim = self.site.channel_dim
        return featurewise_affine(
            x, modulation, dim, form="raw", norm=self._normed, where=self.where
        )

    def _normed(self, h: Tensor) -> Tensor:
        """(h - μ)/σ."""
        if self._positions(h) < 2:
            raise condmod.ShapeError(
                f"a spread is over more than one position; got features {tuple(h.shape)}"
            )
        dim = self.site.channel_dim
        mean, spread = (align(h, leaf, dim) for leaf in self._statistics(h))
        return torch.addcmul(-mean / spread, h, 1 / spread)

    def _statistics(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread of each channel, (B, C)."""
        begin, end = self._places(h)
        var, mean = torch.var_mean(h, tuple(range(begin, end)))
        return mean, (var + self.config.eps).sqrt()

    def _places(self, h: Tensor) -> tuple[int, int]:
        """The dims of positions, first and behind the last."""
        return (2, h.ndim) if self.site.channel_dim == 1 else (1, h.ndim - 1)

    def _positions(self, h: Tensor) -> int:
        begin, end = self._places(h)
        return h.shape[begin:end].numel()
