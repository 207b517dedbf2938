"""adaLN-LoRA of Cosmos-Predict."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

import condmod
from condmod.functional import ScaleShiftGate, blank_linear, low_rank, normalisation, widened
from condmod_block._around import Eps, enter_normed, exit_gated, split, widened_sum


class CosmosConfig(condmod.ModulatorConfig):
    """Options of `cosmos`."""

    rank: condmod.Width = 256
    """r, the width between the two Linears of a sublayer."""
    eps: Eps = 1e-6
    """Added to the variance."""


class FromTrunk(NamedTuple):
    """What every sublayer reads of a condition."""

    embedding: Tensor
    """RMS(c), (B, ..., D)."""
    rows: Tensor
    """[shift, scale, gate] that all sublayers have in common, (B, ..., 3·C)."""


class Trunk(nn.Module):
    """RMS(c) and W₂·silu(W₁·c), which a bank runs once for all its sites."""

    def __init__(self, condition_dim: int, features: int) -> None:
        super().__init__()
        self.norm = normalisation("rms", condition_dim, affine="weight", eps=1e-6)
        self.hidden = blank_linear(condition_dim, features, bias=False)
        self.proj = blank_linear(features, 3 * features, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.norm.reset_parameters()
        drawn(self.hidden)
        drawn(self.proj)

    def forward(self, condition: Tensor) -> FromTrunk:
        """Both, from a condition (B, ..., D)."""
        embedding = widened(condition, self.norm, str).to(condition.dtype)
        return FromTrunk(embedding, self.proj(nn.functional.silu(self.hidden(condition))))


def drawn(layer: nn.Linear) -> None:
    """A normal distribution of variance 1/inputs, cut at three deviations."""
    std = layer.in_features**-0.5
    nn.init.trunc_normal_(layer.weight, std=std, a=-3 * std, b=3 * std)


class Cosmos(condmod.SublayerModulator[CosmosConfig, ScaleShiftGate]):
    """Cosmos: x + gate·f((1 + scale)·LN(x) + shift), from U·V·silu(RMS(c)) + W₂·silu(W₁·c).

    V (D to r) and U (r to 3C) are a sublayer's own; W₁, W₂ and the RMS norm, which has a weight,
    are shared by all sublayers of all blocks. c is a bare sinusoid of the time. Rows of U and W₂
    are [shift, scale, gate]; nothing has a bias, and LN has no parameters.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; LN is
        over the channels of each position.

    Init:
        published: V, W₁ and W₂ normal with variance 1/inputs, cut at three deviations; U 0, the
        RMS norm's weight 1. No start has gate 1, since there is no bias.

    Source:
        NVIDIA, Cosmos World Foundation Model Platform for Physical AI, 2025, arXiv:2501.03575,
        nvidia-cosmos/cosmos-predict2 cosmos_predict2/models/text2image_dit.py (Apache-2.0).
    """

    name = "cosmos"
    Config = CosmosConfig
    kinds = frozenset({"global", "aligned", "rows"})
    enter = enter_normed
    exit = exit_gated

    def __init__(self, config: CosmosConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation("layer", site.features, site.channel_dim, eps=config.eps)
        self.proj = low_rank(self.condition_dim, config.rank, 3 * site.features)
        self.reset_parameters()

    @classmethod
    def shared(cls, config: CosmosConfig, sites: Sequence[condmod.Site]) -> nn.Module:  # noqa: ARG003
        """W₁, W₂ and the RMS norm."""
        return Trunk(*condmod.one_size(cls.name, sites))

    def reset_parameters(self) -> None:
        """Draw V and U afresh; the trunk draws its own."""
        down, up = self.proj.children()
        assert isinstance(down, nn.Linear)
        assert isinstance(up, nn.Linear)
        drawn(down)
        nn.init.zeros_(up.weight)

    def generate(self, condition: Any) -> tuple[ScaleShiftGate, ...]:
        """The sublayer's own rows plus the shared ones, leaves (B, C) or (B, ..., C)."""
        shared: FromTrunk = self.received(condition)
        own = self.proj(nn.functional.silu(shared.embedding))
        return split(widened_sum(own, shared.rows), self.parts)
