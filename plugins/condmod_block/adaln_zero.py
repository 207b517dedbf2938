"""adaLN-Zero of DiT."""

from typing import Literal

import condmod
from condmod.functional import ScaleShiftGate, blank_linear, normalisation, reset_constant
from condmod_block._around import Eps, Parts, enter_normed, exit_gated, prepare_silu, unpack_parts


class AdaLNZeroConfig(condmod.ModulatorConfig):
    """Options of `adaln_zero`."""

    parts: Parts = 2
    """How many sublayers one projection serves; DiT has 2, attention and feed-forward."""
    eps: Eps = 1e-6
    """Added to the variance."""
    init: Literal["published", "identity"] = "published"
    """Zero as in DiT (every branch closed), or gates at 1 (x + f(norm(x)) at the start)."""


class AdaLNZero(condmod.SublayerModulator[AdaLNZeroConfig, ScaleShiftGate]):
    """adaLN-Zero: x + gate·f((1 + scale)·LN(x) + shift), around each of `parts` sublayers f.

    LN has no parameters. One projection W·silu(c) + b gives all parts, rows
    [shift, scale, gate] for each part in turn.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; LN is
        over the channels of each position.

    Init:
        published: weight and bias 0, so every block starts as y = x; in the first step only the
        gates get a gradient. identity: weight 0, gate 1: y = x + f(LN(x)).

    Source:
        Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, arXiv:2212.09748.
    """

    name = "adaln_zero"
    Config = AdaLNZeroConfig
    kinds = frozenset({"global", "aligned", "rows"})
    prepare = prepare_silu
    unpack = unpack_parts
    generate = condmod.generate_linear
    enter = enter_normed
    exit = exit_gated

    def __init__(self, config: AdaLNZeroConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.parts = config.parts
        self.norm = normalisation("layer", site.features, site.channel_dim, eps=config.eps)
        self.proj = blank_linear(self.condition_dim, 3 * config.parts * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter as at the start; nothing is random."""
        reset_constant(self.proj, (0, 0, self.config.init == "identity") * self.parts)
