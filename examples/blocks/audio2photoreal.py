"""Audio2Photoreal's motion decoder: dense_film behind every sublayer, names as published.

python examples/blocks/audio2photoreal.py
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from condmod import Signal, Site, convert, create

HEADS, HIDDEN, DROPOUT = 4, 1024, 0.1
ATTENTION = {"1": "self_attn", "2": "multihead_attn", "2a": "multihead_attn2"}


class Rotary(nn.Module):
    """Turns channels 2i and 2i + 1 of token t by the angle t·θ^(-2i/C), with θ = 10 000."""

    def __init__(self, features: int) -> None:
        super().__init__()
        powers = torch.arange(0, features, 2, dtype=torch.float64) / features
        self.register_buffer("freqs", (1e4**-powers).float())

    def forward(self, x: Float[Tensor, "B T C"]) -> Tensor:
        """The same tokens, each turned by its own index."""
        tokens = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)
        angles = tokens[:, None] * self.freqs
        cos, sin, even, odd = angles.cos(), angles.sin(), x[..., 0::2], x[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return turned.flatten(2).to(x.dtype)


class DecoderLayer(nn.Module):
    """Around each sublayer f: x + film(dropout(f(norm(x))), c).

    Args:
        features: C, of frames, memories and condition.
        rotary: turns queries and keys; one for all layers.
        memories: 1, or 2 with a second cross-attention behind the first.
        norm_first: False for the other order, norm(x + film(dropout(f(x)), c)).
    """

    def __init__(
        self, features: int, rotary: Rotary, *, memories: int = 1, norm_first: bool = True
    ) -> None:
        super().__init__()
        self.rotary, self.norm_first, self.dropout = rotary, norm_first, nn.Dropout(DROPOUT)
        self.places = (*list(ATTENTION)[: 1 + memories], "3")
        for place in self.places:
            self.add_module(f"norm{place}", nn.LayerNorm(features))
            film = create("dense_film(init='xavier')", Site(features, features))
            self.add_module(f"film{place}", film)
        for place in self.places[:-1]:
            attention = nn.MultiheadAttention(features, HEADS, DROPOUT, batch_first=True)
            self.add_module(ATTENTION[place], attention)
        self.linear1, self.linear2 = nn.Linear(features, HIDDEN), nn.Linear(HIDDEN, features)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        condition: Float[Tensor, "B C"] | Float[Tensor, "B T C"],
        *memories: Float[Tensor, "B S C"] | Signal,
        mask: Bool[Tensor, "B T"] | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Frames to frames; False in `mask`, or in a memory's own, hides a token from attention."""
        read = dict(zip(self.places[1:-1], memories, strict=True))
        for place in self.places:
            norm, film = self.get_submodule(f"norm{place}"), self.get_submodule(f"film{place}")
            h = norm(x) if self.norm_first else x
            if place == "3":
                y = self.linear2(self.dropout(F.gelu(self.linear1(h))))
            else:
                y = self._attend(place, h, read.get(place, Signal(h, mask)), causal)
            x = x + film(self.dropout(y), condition)
            x = x if self.norm_first else norm(x)
        return x

    def _attend(self, place: str, h: Tensor, memory: Tensor | Signal, causal: bool) -> Tensor:
        tokens, real, *_ = memory if isinstance(memory, Signal) else Signal(memory)
        unreal = None if real is None else ~real
        ahead = None
        if causal and place == "1":
            ahead = h.new_ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1)
        q, k, attention = self.rotary(h), self.rotary(tokens), self.get_submodule(ATTENTION[place])
        y: Tensor = attention(q, k, tokens, unreal, need_weights=False, attn_mask=ahead)[0]
        return y


class Decoder(nn.Module):
    """The stack, and the rotary that its layers share, under the names of a checkpoint."""

    def __init__(self, features: int, layers: int = 8, **options: Any) -> None:
        super().__init__()
        self.rotary = Rotary(features)
        stack = [DecoderLayer(features, self.rotary, **options) for _ in range(layers)]
        self.seqTransDecoder = nn.ModuleDict({"stack": nn.ModuleList(stack)})

    def forward(self, x: Tensor, condition: Tensor, *memories: Any, **how: Any) -> Tensor:
        """What a layer does, once per layer."""
        for layer in self.seqTransDecoder["stack"]:
            x = layer(x, condition, *memories, **how)
        return x


if __name__ == "__main__":
    pose = Decoder(64, layers=2, memories=2)  # published: 256 features, 8 layers
    frames, audio, keyframes = (torch.randn(2, length, 64) for length in (60, 30, 2))
    for condition in (torch.randn(2, 64), torch.randn(2, 60, 64)):
        shape = tuple(pose(frames, condition, audio, keyframes, causal=True).shape)
        print(f"condition {tuple(condition.shape)}: {shape}")
    theirs = convert(pose, "audio2photoreal", pose.state_dict(), inverse=True)
    pose.load_state_dict(convert(pose, "audio2photoreal", theirs))
    print(f"{len(theirs)} published keys, there and back, as in {next(iter(theirs))}")
