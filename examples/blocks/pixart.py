"""PixArt-α's blocks: adaln_single, one trunk for all of them and a table for each.

python examples/blocks/pixart.py
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

import condmod
from condmod import Signal, Site
from condmod.functional import ScaleShiftGate


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, real: Tensor | None = None) -> Tensor:
    """Attention of queries (B, T, C) to those keys that are real."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    mask = None if real is None else real[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """x + gate·f((1 + scale)·LN(x) + shift) for both f, and between them x + attention to a text.

    Args:
        features: C, of tokens, text and condition.
        heads: of each attention.
    """

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(features, 3 * features), "proj": nn.Linear(features, features)}
        )
        self.cross_attn = nn.ModuleDict(
            {
                "q_linear": nn.Linear(features, features),
                "kv_linear": nn.Linear(features, 2 * features),
                "proj": nn.Linear(features, features),
            }
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(features, 4 * features), "fc2": nn.Linear(4 * features, features)}
        )
        for linear in (*self.attn.values(), *self.cross_attn.values(), *self.mlp.values()):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.cross_attn["proj"].weight)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        modulator: condmod.SublayerModulator[Any, ScaleShiftGate],
        parts: tuple[ScaleShiftGate, ...],
        text: Float[Tensor, "B S C"] | Signal,
    ) -> Tensor:
        """Tokens to tokens, with what the bank generated for this block."""
        first, second = parts
        q, k, v = self.attn["qkv"](modulator.enter(x, first, None)).chunk(3, -1)
        x = modulator.exit(x, self.attn["proj"](attend(q, k, v, self.heads)), first, None)
        tokens, real, *_ = text if isinstance(text, Signal) else Signal(text)
        k, v = self.cross_attn["kv_linear"](tokens).chunk(2, -1)
        y = attend(self.cross_attn["q_linear"](x), k, v, self.heads, real)
        x = x + self.cross_attn["proj"](y)
        h = self.mlp["fc1"](modulator.enter(x, second, None))
        return modulator.exit(x, self.mlp["fc2"](F.gelu(h, approximate="tanh")), second, None)


class Blocks(nn.Module):
    """The stack, whose bank runs the trunk once for all blocks; names as published.

    Args:
        features: C, of tokens, text and condition.
        heads: of each attention.
        layers: how many blocks.
    """

    def __init__(self, features: int, heads: int, layers: int) -> None:
        super().__init__()
        sites = {f"blocks.{i}": Site(features, features) for i in range(layers)}
        self.bank = condmod.create_bank("adaln_single", sites)
        self.blocks = nn.ModuleList(Block(features, heads) for _ in sites)

    def forward(
        self, x: Float[Tensor, "B T C"], condition: Tensor, text: Tensor | Signal
    ) -> Tensor:
        """Tokens to tokens; a text with a mask is a Signal."""
        for (name, parts), block in zip(self.bank(condition).items(), self.blocks, strict=True):
            x = block(x, self.bank[name], parts, text)
        return x


if __name__ == "__main__":
    blocks = Blocks(64, heads=4, layers=3)
    encoder = condmod.create_encoder("timestep(hidden=[64])", out_dim=64)
    condition, x = encoder(torch.tensor([17, 403])), torch.randn(2, 16, 64)
    text = Signal(torch.randn(2, 5, 64), mask=torch.arange(5) < torch.tensor([[5], [3]]))
    print(f"{tuple(blocks(x, condition, text).shape)}")
    trunk = sum(p.numel() for p in blocks.bank.shared.parameters())
    own = sum(p.numel() for p in blocks.bank["blocks.0"].parameters())
    print(f"one trunk of {trunk:,} parameters, and {own} for each block")
    theirs = condmod.convert(blocks, "pixart", blocks.state_dict(), inverse=True)
    print(f"a checkpoint has {len(theirs)} keys, as {', '.join(list(theirs)[:3])}")
