"""The dual attention of MM-DiT-X, in SD3.5 medium."""

from typing import Literal

from torch import Tensor

import condmod
from condmod.functional import ScaleShiftGate, blank_linear, normalisation, reset_constant
from condmod_block._around import Eps, between_gated, enter_normed, exit_gated, prepare_silu, split


class SD35Config(condmod.ModulatorConfig):
    """Options of `sd35`."""

    eps: Eps = 1e-6
    """Added to the variance."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default, or gates at 1 over plain LN at the start."""


class SD35(condmod.SublayerModulator[SD35Config, ScaleShiftGate]):
    """MM-DiT-X: x + g₁·attn(m₁(LN(x))) + g₂·attn₂(m₂(LN(x))), then feed-forward; m = (1 + s)·h + t.

    Both attentions read the same x, the feed-forward what they gave. The parts are attention,
    second attention, feed-forward; rows of W in W·silu(c) + b are [shift, scale, gate] for
    attention, feed-forward, second attention. LN has no parameters.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; LN is
        over the channels of each position.

    Init:
        published: torch's Linear default. identity: weight 0, gate 1:
        h = x + attn(LN(x)) + attn₂(LN(x)), y = h + f(LN(h)).

    Source:
        Stability-AI/sd3.5 mmditx.py (MIT), `x_block_self_attn`; without a paper of its own, on
        the block of Esser et al., 2024, arXiv:2403.03206.
    """

    name = "sd35"
    Config = SD35Config
    kinds = frozenset({"global", "aligned", "rows"})
    parts = 3
    reads = (0, 0, 2)
    prepare = prepare_silu
    generate = condmod.generate_linear
    enter = enter_normed
    exit = exit_gated
    between = between_gated

    def __init__(self, config: SD35Config, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation("layer", site.features, site.channel_dim, eps=config.eps)
        self.proj = blank_linear(self.condition_dim, 9 * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.proj.reset_parameters()
        if self.config.init == "identity":
            reset_constant(self.proj, (0, 0, 1) * self.parts)

    def unpack(self, projected: Tensor) -> tuple[ScaleShiftGate, ...]:
        """The projection's output as modulations of both attentions and the feed-forward."""
        attention, feed_forward, second_attention = split(projected, self.parts)
        return attention, second_attention, feed_forward
