"""adaLN-single of PixArt-α."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

import condmod
from condmod.functional import ScaleShiftGate, normalisation
from condmod_block._around import (
    Eps,
    Parts,
    Trunk,
    between_gated,
    closed,
    enter_normed,
    exit_gated,
    reset_table,
    split,
    widened_sum,
)


class AdaLNSingleConfig(condmod.ModulatorConfig):
    """Options of `adaln_single`."""

    parts: Parts = 2
    """How many sublayers one table serves; PixArt has 2, self-attention and feed-forward."""
    norm: Literal["layer", "rms"] = "layer"
    """LN as in PixArt and Sana, or RMS norm as in LTX-Video; without parameters."""
    eps: Eps = 1e-6
    """Added to the variance, or to the mean square."""
    init: Literal["published", "identity"] = "published"
    """PixArt's random table, or x + f(norm(x)) at the start."""


def drawn(layer: nn.Linear) -> None:
    """The trunk as in PixArt: N(0, 0.02²), bias 0."""
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)


class AdaLNSingle(condmod.SublayerModulator[AdaLNSingleConfig, ScaleShiftGate]):
    """adaLN-single: x + gate·f((1 + scale)·LN(x) + shift), from W·silu(c) + b + a table per block.

    W and b are shared by all blocks, so a block has only its table, (3·parts, C). Rows of W and
    of the table are [shift, scale, gate] for each of `parts` sublayers f in turn. LN has no
    parameters.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; LN is
        over the channels of each position.

    Init:
        published: table N(0, 1)/√C, W N(0, 0.02²), b 0 (not the identity). identity: W and b 0,
        table 0 but for the gates, 1: y = x + f(LN(x)).

    Source:
        Chen et al., PixArt-α: Fast Training of Diffusion Transformer for Photorealistic
        Text-to-Image Synthesis, 2023, arXiv:2310.00426, PixArt-alpha/PixArt-alpha
        diffusion/model/nets/PixArt.py (Apache-2.0).
    """

    name = "adaln_single"
    Config = AdaLNSingleConfig
    kinds = frozenset({"global", "aligned", "rows"})
    enter = enter_normed
    exit = exit_gated
    between = between_gated

    def __init__(self, config: AdaLNSingleConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.parts = config.parts
        self.norm = normalisation(config.norm, site.features, site.channel_dim, eps=config.eps)
        self.table = nn.Parameter(torch.empty(3 * config.parts, site.features))
        self.reset_parameters()

    @classmethod
    def shared(cls, config: AdaLNSingleConfig, sites: Sequence[condmod.Site]) -> nn.Module:
        """W and b, and silu in front of them."""
        condition_dim, features = condmod.one_size(cls.name, sites)
        draw = closed if config.init == "identity" else drawn
        return Trunk(condition_dim, 3 * config.parts * features, draw)

    def reset_parameters(self) -> None:
        """Draw the table afresh; the trunk draws its own."""
        reset_table(self.table, identity=self.config.init == "identity")

    def generate(self, condition: Any) -> tuple[ScaleShiftGate, ...]:
        """Trunk and table as one modulation for each part, leaves (B, C) or (B, ..., C)."""
        return split(widened_sum(self.received(condition), self.table.flatten()), self.parts)
