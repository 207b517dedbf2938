"""The modulation of Stable Audio's transformer."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import condmod
from condmod.functional import (
    Leaf,
    blank_linear,
    featurewise_affine,
    gated_residual,
    normalisation,
    reset_linears,
)
from condmod_block._around import Eps, widened_sum


class StableAudioConfig(condmod.ModulatorConfig):
    """Options of `stable_audio`."""

    norm: Literal["layer", "rms"] = "layer"
    """LN, or RMS norm as in Stable Audio 3; with a weight and without a bias."""
    eps: Eps = 1e-5
    """Added to the variance, or to the mean square, where Stable Audio 3 has 1e-6."""


class Attention(NamedTuple):
    """What goes around self-attention; leaves (B, C) or (B, *positions, C)."""

    scale: Leaf
    shift: Leaf
    gate: Leaf


class FeedForward(NamedTuple):
    """What goes around the feed-forward; leaves as in Attention."""

    scale: Leaf
    shift: Leaf
    gate: Leaf


Part: TypeAlias = Attention | FeedForward


class Trunk(nn.Module):
    """W₂·silu(W₁·c + b₁) + b₂, which a bank runs once for all its sites."""

    def __init__(self, condition_dim: int, features: int) -> None:
        super().__init__()
        self.hidden = blank_linear(condition_dim, features)
        self.proj = blank_linear(features, 6 * features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        reset_linears(self)

    def forward(self, condition: Tensor) -> Tensor:
        """(B, ..., D) to (B, ..., 6·C)."""
        projected: Tensor = self.proj(nn.functional.silu(self.hidden(condition)))
        return projected


class StableAudio(condmod.SublayerModulator[StableAudioConfig, Part]):
    """Stable Audio: x + σ(1 - gate)·f((1 + scale)·norm(x) + shift), from a trunk and a table.

    The trunk W₂·silu(W₁·c + b₁) + b₂ is shared by all blocks; a block adds its table, (6·C,). The
    parts are self-attention and feed-forward, each with a norm that has a weight of its own; rows
    of W₂ and of the table are [scale, shift, gate] for each in turn.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; the norm
        is over the channels of each position.

    Init:
        published: table N(0, 1)/√C, torch's Linear default, weights of norms 1. No start has
        gate 1: a sigmoid never reaches it.

    Source:
        Stability-AI/stable-audio-tools stable_audio_tools/models/transformer.py (MIT), with
        `global_cond_type="adaLN"`; Evans et al., Stable Audio Open, 2024, arXiv:2407.14358.
    """

    name = "stable_audio"
    Config = StableAudioConfig
    kinds = frozenset({"global", "aligned", "rows"})
    site_params = True
    parts = 2

    def __init__(self, config: StableAudioConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.attention_norm, self.feed_forward_norm = (
            normalisation(
                config.norm, site.features, site.channel_dim, affine="weight", eps=config.eps
            )
            for _ in range(self.parts)
        )
        self.table = nn.Parameter(torch.empty(6 * site.features))
        self.reset_parameters()

    @classmethod
    def shared(cls, config: StableAudioConfig, sites: Sequence[condmod.Site]) -> nn.Module:  # noqa: ARG003
        """Both Linears, and silu between them."""
        return Trunk(*condmod.one_size(cls.name, sites))

    def reset_parameters(self) -> None:
        """Draw the table and the norms afresh; the trunk draws its own."""
        self.attention_norm.reset_parameters()
        self.feed_forward_norm.reset_parameters()
        nn.init.normal_(self.table, std=self.site.features**-0.5)

    def generate(self, condition: Any) -> tuple[Part, ...]:
        """Trunk and table as one modulation for each part, leaves (B, C) or (B, ..., C)."""
        chunks = widened_sum(self.received(condition), self.table).chunk(6, dim=-1)
        return Attention(*chunks[:3]), FeedForward(*chunks[3:])

    def enter(
        self,
        x: Tensor,
        modulation: Part,
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """(1 + scale)·norm(x) + shift, with the part's own norm."""
        attention = isinstance(modulation, Attention)
        norm = self.attention_norm if attention else self.feed_forward_norm
        affine, dim = (modulation.scale, modulation.shift), self.site.channel_dim
        return featurewise_affine(x, affine, dim, norm=norm, where=self.where)

    def exit(
        self,
        x: Tensor,
        y: Tensor,
        modulation: Part,
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """X plus σ(1 - gate) times the output of the sublayer."""
        dim = self.site.channel_dim
        return gated_residual(
            x, y, modulation.gate, dim, form="sigmoid_one_minus", where=self.where
        )
