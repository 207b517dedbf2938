"""The modulation of MM-DiT's streams, in SD3 and Flux."""

from typing import Literal

import condmod
from condmod.functional import ScaleShiftGate, blank_linear, normalisation, reset_constant
from condmod_block._around import (
    Eps,
    Parts,
    between_gated,
    enter_normed,
    exit_gated,
    prepare_silu,
    unpack_parts,
)


class MMDiTConfig(condmod.ModulatorConfig):
    """Options of `mmdit`."""

    parts: Parts = 2
    """2 for a stream of a double block (attention, feed-forward), 1 for Flux's single block."""
    eps: Eps = 1e-6
    """Added to the variance."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default, or x + f(LN(x)) at the start."""


class MMDiT(condmod.SublayerModulator[MMDiTConfig, ScaleShiftGate]):
    """MM-DiT: x + gate·f((1 + scale)·LN(x) + shift), around each of `parts` sublayers f.

    Each stream, image or text, has a modulator of its own. LN has no parameters. One projection
    W·silu(c) + b gives all parts, rows [shift, scale, gate] for each part in turn.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; LN is
        over the channels of each position.

    Init:
        published: torch's Linear default (not the identity: gates are small, of either sign).
        identity: weight 0, gate 1: y = x + f(LN(x)).

    Source:
        Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis,
        2024, arXiv:2403.03206, Stability-AI/sd3.5 mmditx.py (MIT); black-forest-labs/flux
        src/flux/modules/layers.py (Apache-2.0).
    """

    name = "mmdit"
    aliases = ("flux",)
    Config = MMDiTConfig
    kinds = frozenset({"global", "aligned", "rows"})
    prepare = prepare_silu
    unpack = unpack_parts
    generate = condmod.generate_linear
    enter = enter_normed
    exit = exit_gated
    between = between_gated

    def __init__(self, config: MMDiTConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.parts = config.parts
        self.norm = normalisation("layer", site.features, site.channel_dim, eps=config.eps)
        self.proj = blank_linear(self.condition_dim, 3 * config.parts * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.proj.reset_parameters()
        if self.config.init == "identity":
            reset_constant(self.proj, (0, 0, 1) * self.parts)
