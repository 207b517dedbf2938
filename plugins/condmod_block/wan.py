"""adaLN-single as in Wan."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

import condmod
from condmod.functional import ScaleShiftGate, normalisation
from condmod_block._around import (
    Eps,
    Trunk,
    between_gated,
    closed,
    enter_normed,
    exit_gated,
    reset_table,
    split,
    widened_sum,
)


class WanConfig(condmod.ModulatorConfig):
    """Options of `wan`."""

    eps: Eps = 1e-6
    """Added to the variance."""
    init: Literal["published", "identity"] = "published"
    """Wan's random table, or x + f(LN(x)) at the start."""


def drawn(layer: nn.Linear) -> None:
    """The trunk as in Wan: Xavier uniform, bias 0."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


class Wan(condmod.SublayerModulator[WanConfig, ScaleShiftGate]):
    """Wan: x + gate·f((1 + scale)·LN(x) + shift), from W·silu(c) + b + a table, a time per token.

    W and b are shared by all blocks; a block has only its table, (1, 6, C). The parts are
    self-attention and feed-forward; rows of W and of the table are [shift, scale, gate] for each
    in turn. Their sum is float32 or wider, whatever the parameters are. LN has no parameters.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) for a time per sample
        (Wan 2.1), or aligned to x for one per token (Wan 2.2); LN is over the channels of each
        position.

    Init:
        published: table N(0, 1)/√C, W Xavier uniform, b 0 (not the identity). identity: W and b
        0, table 0 but for the gates, 1: y = x + f(LN(x)).

    Source:
        Wan Team, Wan: Open and Advanced Large-Scale Video Generative Models, 2025,
        arXiv:2503.20314, Wan-Video/Wan2.1 wan/modules/model.py (Apache-2.0).
    """

    name = "wan"
    Config = WanConfig
    kinds = frozenset({"global", "aligned", "rows"})
    parts = 2
    enter = enter_normed
    exit = exit_gated
    between = between_gated

    def __init__(self, config: WanConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation("layer", site.features, site.channel_dim, eps=config.eps)
        self.table = nn.Parameter(torch.empty(1, 6, site.features))
        self.reset_parameters()

    @classmethod
    def shared(cls, config: WanConfig, sites: Sequence[condmod.Site]) -> nn.Module:
        """W and b, and silu in front of them."""
        condition_dim, features = condmod.one_size(cls.name, sites)
        return Trunk(condition_dim, 6 * features, closed if config.init == "identity" else drawn)

    def reset_parameters(self) -> None:
        """Draw the table afresh; the trunk draws its own."""
        reset_table(self.table, identity=self.config.init == "identity")

    def generate(self, condition: Any) -> tuple[ScaleShiftGate, ...]:
        """Trunk and table as one modulation for each part, leaves (B, C) or (B, ..., C)."""
        return split(widened_sum(self.received(condition), self.table.flatten()), self.parts)
