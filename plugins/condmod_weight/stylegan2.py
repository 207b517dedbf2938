"""Weight modulation and demodulation of StyleGAN2."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import condmod
from condmod.functional import (
    blank_linear,
    featurewise_affine,
    featurewise_scale,
    reset_constant,
)
from condmod_weight._layers import energy, refused, sizes

_EPS = 1e-8


class StyleGAN2Config(condmod.ModulatorConfig):
    """Options of `stylegan2`."""

    demodulate: bool = True
    """Scale each output channel's weight to the length 1, as all layers but toRGB have it."""
    init: Literal["published", "identity"] = "published"
    """Styles around 1 as published, or 1 whatever the condition is."""


class Style(NamedTuple):
    """What scales the channels that a weight reads, (B, C)."""

    style: Tensor


class StyleGAN2(condmod.SublayerModulator[StyleGAN2Config, Style]):
    """StyleGAN2: f with the weight W·s/√(Σ(W·s)² + 1e-8), where s = A·c + b scales what W reads.

    The sum is over all that an output channel reads. It is computed as x·s, the layer, and a scale
    of each output channel, so no sample has a copy of W. The layer's own bias is added after the
    demodulation.

    Shapes:
        x (B, ..., C) around a Linear; (B, C, ...) around a Conv1d to 3d or a ConvTranspose1d to
        3d, grouped or not; condition (B, D). Gives what the layer gives.

    Init:
        published: A from N(0, 1/D), b = 1. identity: A = 0, so s = 1 whatever c is; without
        demodulation that is the layer itself.

    Source:
        Karras et al., Analyzing and Improving the Image Quality of StyleGAN, 2019,
        arXiv:1912.04958; from the formula, since the official code is not free.
    """

    name = "stylegan2"
    Config = StyleGAN2Config
    kinds = frozenset({"global"})
    reads_weight = True
    changes_width = True
    generate = condmod.generate_linear

    def __init__(self, config: StyleGAN2Config, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.proj = blank_linear(self.condition_dim, site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        reset_constant(self.proj, (1,))
        if self.config.init == "published":
            nn.init.normal_(self.proj.weight, std=self.condition_dim**-0.5)

    @classmethod
    def as_base(cls, config: StyleGAN2Config) -> Mapping[str, Any]:  # noqa: ARG003
        """No demodulation, and styles of 1."""
        return {"demodulate": False, "init": "identity"}

    @classmethod
    def refuses_layer(cls, layer: nn.Module) -> str:
        """Why it cannot read a layer's weight; "" where it can."""
        return refused(layer)

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> tuple[Style]:
        """The projection's output as the style."""
        return (Style(projected),)

    def enter(self, x: Tensor, modulation: Style, sublayer: condmod.Sublayer | None) -> Tensor:
        """x·s; with demodulation s over its largest entry, which that takes out again."""
        layer = self._layer(sublayer)
        self.check_channels(x)
        if self.site.channel_dim == 1 and x.ndim != layer.weight.ndim:
            raise condmod.ShapeError(
                f"{self.where()} is around {layer}, which takes features of rank "
                f"{layer.weight.ndim}; got {tuple(x.shape)}"
            )
        style = _unit(modulation.style)[0] if self.config.demodulate else modulation.style
        return featurewise_scale(x, style, self.site.channel_dim, form="raw", where=self.where)

    def exit(
        self,
        x: Tensor,  # noqa: ARG002
        y: Tensor,
        modulation: Style,
        sublayer: condmod.Sublayer | None,
    ) -> Tensor:
        """The demodulated output, and the layer's bias as it is."""
        if not self.config.demodulate:
            return y
        layer, dim = self._layer(sublayer), self.site.channel_dim
        style, peak = _unit(modulation.style)
        factor = (energy(layer, style) + _EPS / peak.square()).rsqrt()
        if layer.bias is None:
            return featurewise_scale(y, factor, dim, form="raw", where=self.where)
        shift = layer.bias * (1 - factor)  # y holds the bias already
        return featurewise_affine(y, (factor, shift), dim, form="raw", where=self.where)

    def _layer(self, sublayer: Any) -> Any:
        """The sublayer, a layer of the site's sizes whose weight can be read."""
        if reason := refused(sublayer):
            raise condmod.SiteError(f"{self.where()} cannot act around this sublayer: {reason}")
        site = self.site
        wanted = (site.features, site.out_features or site.features, site.channel_dim)
        if sizes(sublayer) != wanted:
            raise condmod.ShapeError(
                f"{self.where()} is for a layer from {wanted[0]} to {wanted[1]} features with "
                f"channels at dim {wanted[2]}; got {sublayer}"
            )
        return sublayer


def _unit(style: Tensor) -> tuple[Tensor, Tensor]:
    """s over its largest entry, and that entry (B, 1).

    Demodulation gives the same for any multiple of s. With this one half-precision features
    neither overflow nor get lost beside the layer's bias.
    """
    wide = style.to(torch.promote_types(style.dtype, torch.float32))
    peak = wide.detach().abs().amax(-1, keepdim=True).clamp_min(_EPS**0.5)
    return wide / peak, peak
