"""The modulation that all blocks of Flux.2 share."""

from collections.abc import Sequence
from typing import Any

from torch import nn

import condmod
from condmod.functional import ScaleShiftGate, normalisation
from condmod_block._around import Eps, Parts, Trunk, between_gated, enter_normed, exit_gated, split


class Flux2Config(condmod.ModulatorConfig):
    """Options of `flux2`."""

    parts: Parts = 2
    """2 for a stream of the double blocks (attention, feed-forward), 1 for the single blocks."""
    eps: Eps = 1e-6
    """Added to the variance."""


class Flux2(condmod.SublayerModulator[Flux2Config, ScaleShiftGate]):
    """Flux.2: x + gate·f((1 + scale)·LN(x) + shift), with one W·silu(c) for all blocks.

    Sites have no parameters: every block of a bank gets the same modulation. Rows of W are
    [shift, scale, gate] for each of `parts` sublayers f in turn; there is no bias, and LN has no
    parameters.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; LN is
        over the channels of each position.

    Init:
        published: torch's Linear default. No start has gate 1, since there is no bias.

    Source:
        black-forest-labs/flux2 src/flux2/model.py (Apache-2.0).
    """

    name = "flux2"
    Config = Flux2Config
    kinds = frozenset({"global", "aligned", "rows"})
    enter = enter_normed
    exit = exit_gated
    between = between_gated

    def __init__(self, config: Flux2Config, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.parts = config.parts
        self.norm = normalisation("layer", site.features, site.channel_dim, eps=config.eps)

    @classmethod
    def shared(cls, config: Flux2Config, sites: Sequence[condmod.Site]) -> nn.Module:
        """W, and silu in front of it."""
        condition_dim, features = condmod.one_size(cls.name, sites)
        rows = 3 * config.parts * features
        return Trunk(condition_dim, rows, nn.Linear.reset_parameters, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: the trunk has all parameters."""

    def generate(self, condition: Any) -> tuple[ScaleShiftGate, ...]:
        """The trunk's output as one modulation for each part, leaves (B, C) or (B, ..., C)."""
        return split(self.received(condition), self.parts)
