"""The modulation of both streams around one sublayer of CogVideoX."""

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


class CogVideoXConfig(condmod.ModulatorConfig):
    """Options of `cogvideox`."""

    eps: Eps = 1e-5
    """Added to the variance."""
    init: Literal["published", "identity"] = "published"
    """Zero (every branch closed), or gates at 1 (x + f(LN(x)) at the start)."""


class CogVideoX(condmod.SublayerModulator[CogVideoXConfig, ScaleShiftGate]):
    """CogVideoX: x + gate·f((1 + scale)·LN(x) + shift), for video and text around one sublayer f.

    LN has its own weight and bias, which both streams share. The parts are video and text; rows
    of W in W·silu(c) + b are [shift, scale, gate] for each in turn. A block has two such
    modulators, for attention and feed-forward. The model enters and exits its streams by itself;
    `forward` runs both parts over one x.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2, of either stream; condition (B, D) or
        aligned to x; LN is over the channels of each position.

    Init:
        published: weight and bias 0, so every block starts as y = x; LN's affine at 1 and 0.
        identity: weight 0, gate 1: y = x + f(LN(x)) for each part.

    Source:
        Yang et al., CogVideoX: Text-to-Video Diffusion Models with An Expert Transformer, 2024,
        arXiv:2408.06072; THUDM/CogVideo sat/dit_video_concat.py (Apache-2.0), halved as in
        huggingface/diffusers CogVideoXLayerNormZero (Apache-2.0).
    """

    name = "cogvideox"
    Config = CogVideoXConfig
    kinds = frozenset({"global", "aligned", "rows"})
    site_params = True
    parts = 2
    prepare = prepare_silu
    unpack = unpack_parts
    generate = condmod.generate_linear
    enter = enter_normed
    exit = exit_gated
    between = between_gated

    def __init__(self, config: CogVideoXConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        features, dim = site.features, site.channel_dim
        self.norm = normalisation("layer", features, dim, affine="both", eps=config.eps)
        self.proj = blank_linear(self.condition_dim, 6 * features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter as at the start; nothing is random."""
        self.norm.reset_parameters()
        reset_constant(self.proj, (0, 0, self.config.init == "identity") * self.parts)
