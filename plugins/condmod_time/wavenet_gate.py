"""The gated unit of WaveNet, with its global or local condition."""

from typing import Literal

from torch import Tensor

import condmod
from condmod.functional import (
    Shift,
    add_shift,
    blank_linear,
    in_layout_of,
    reset_constant,
    same_shape,
    widened,
)


class WaveNetGateConfig(condmod.ModulatorConfig):
    """Options of `wavenet_gate`."""

    init: Literal["published", "identity"] = "published"
    """Torch's Linear default as published, or tanh(a)·σ(b) at the start."""


class WaveNetGate(condmod.SublayerModulator[WaveNetGateConfig, Shift]):
    """WaveNet's gate: tanh(a + g_a)·σ(b + g_b), with (a, b) = f(x) and (g_a, g_b) = W·c + b_0.

    The sublayer f is a convolution, dilated as a rule, that gives twice the channels that come
    out: 2C, or `out_features` of the site. Rows of W are [g_a, g_b]; the condition is not
    activated. Residual and skip paths are outside.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; f gives 2C channels, and C come out;
        condition (B, D), or aligned to what f gives.

    Init:
        published: torch's Linear default, as of one convolution for all layers. identity: W and
        b_0 are 0: y = tanh(a)·σ(b).

    Source:
        van den Oord et al., WaveNet: A Generative Model for Raw Audio, 2016, arXiv:1609.03499;
        as in VITS, jaywalnut310/vits modules.py: WN (MIT), whose convolutions have weight norm.
    """

    name = "wavenet_gate"
    Config = WaveNetGateConfig
    kinds = frozenset({"global", "aligned", "rows"})
    changes_width = True
    generate = condmod.generate_linear

    def __init__(self, config: WaveNetGateConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.width = site.out_features or 2 * site.features
        if self.width % 2:
            raise condmod.SiteError(
                f"{self.where()} halves what its sublayer gives: out_features is even; got "
                f"out_features={self.width}"
            )
        self.proj = blank_linear(self.condition_dim, self.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.proj.reset_parameters()
        if self.config.init == "identity":
            reset_constant(self.proj, (0,))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> tuple[Shift]:
        """The projection's output as the one part's shift of both halves."""
        return (Shift(projected),)

    def enter(
        self,
        x: Tensor,
        modulation: Shift,  # noqa: ARG002
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """The features as they are."""
        return x

    def exit(
        self,
        x: Tensor,
        y: Tensor,
        modulation: Shift,
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """tanh(a + g_a)·σ(b + g_b), (a, b) the halves of the sublayer's output."""
        dim = self.site.channel_dim
        if not isinstance(y, Tensor):
            same_shape(x, y, self.where)  # says what it gave
        if y.ndim < 2 or y.shape[dim] != self.width:
            raise condmod.ShapeError(
                f"{self.where()} halves what its sublayer gives, {self.width} channels at dim "
                f"{dim}; the sublayer turned features {tuple(x.shape)} into {tuple(y.shape)}"
            )
        h = add_shift(widened(y, None, self.where), modulation.shift, dim, where=self.where)
        a, b = h.chunk(2, dim)
        return in_layout_of(y, (a.tanh() * b.sigmoid()).to(x.dtype))
