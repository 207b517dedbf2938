"""The modulation of both streams of CogView3+."""

from typing import Literal

import condmod
from condmod.functional import ScaleShiftGate, blank_linear, normalisation, reset_constant
from condmod_block._around import (
    Eps,
    between_gated,
    enter_normed,
    exit_gated,
    prepare_silu,
    unpack_parts,
)


class CogView3Config(condmod.ModulatorConfig):
    """Options of `cogview3`."""

    eps: Eps = 1e-5
    """Added to the variance."""
    init: Literal["published", "identity"] = "published"
    """Zero (every branch closed), or gates at 1 (x + f(LN(x)) at the start)."""


class CogView3(condmod.SublayerModulator[CogView3Config, ScaleShiftGate]):
    """CogView3+: x + gate·f((1 + scale)·LN(x) + shift), one projection for image and text.

    The parts are image attention, image feed-forward, text attention, text feed-forward; rows of
    W in W·silu(c) + b are [shift, scale, gate] for each part in turn. LN has no parameters. The
    model enters and exits its streams by itself; `forward` runs all four parts over one x.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2, of either stream; condition (B, D) or
        aligned to x; LN is over the channels of each position.

    Init:
        published: weight and bias 0, so every block starts as y = x. identity: weight 0, gate 1:
        y = x + f(LN(x)) for each part.

    Source:
        Zheng et al., CogView3: Finer and Faster Text-to-Image Generation via Relay Diffusion,
        2024, arXiv:2403.05121; THUDM/CogView3 sat/sgm/modules/diffusionmodules/dit.py
        (Apache-2.0).
    """

    name = "cogview3"
    Config = CogView3Config
    kinds = frozenset({"global", "aligned", "rows"})
    parts = 4
    prepare = prepare_silu
    unpack = unpack_parts
    generate = condmod.generate_linear
    enter = enter_normed
    exit = exit_gated
    between = between_gated

    def __init__(self, config: CogView3Config, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation("layer", site.features, site.channel_dim, eps=config.eps)
        self.proj = blank_linear(self.condition_dim, 12 * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter as at the start; nothing is random."""
        reset_constant(self.proj, (0, 0, self.config.init == "identity") * self.parts)
