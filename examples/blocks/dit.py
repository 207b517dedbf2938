"""DiT's block: adaln_zero around attention and feed-forward, names as published.

python examples/blocks/dit.py
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

import condmod


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(features, 3 * features), nn.Linear(features, features)

    def forward(self, x: Float[Tensor, "B T C"]) -> Tensor:
        """Tokens to tokens."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class FeedForward(nn.Module):
    """Two layers, four times as wide between."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, x: Float[Tensor, "B T C"]) -> Tensor:
        """Tokens to tokens."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return y


class Block(nn.Module):
    """For both sublayers f: x + gate·f((1 + scale)·LN(x) + shift).

    Args:
        features: C, of the tokens and of the condition.
        heads: of the attention.
    """

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(features, heads), FeedForward(features)
        self.modulator = condmod.create("adaln_zero", features=features, condition_dim=features)
        for linear in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Float[Tensor, "B T C"], condition: condmod.Condition) -> Tensor:
        """Tokens to tokens; the condition is (B, C), one per token (B, T, C), or rows."""
        y: Tensor = self.modulator(x, condition, self.attn, self.mlp)
        return y


if __name__ == "__main__":
    encoder = condmod.create_encoder(
        "fuse(inputs={'time': timestep(hidden=[64]), 'label': label(classes=10)})", out_dim=64
    )
    block, x = Block(64, heads=4), torch.randn(2, 16, 64)
    label = torch.tensor([3, 7])
    for time in (torch.tensor([17, 403]), torch.randint(1000, (2, 16))):
        condition = encoder({"time": time, "label": label})
        y = block(x, condition)
        print(f"time {tuple(time.shape)}, condition {tuple(condition.shape)}: {tuple(y.shape)}")
    print(f"at the start y is x: {torch.equal(y, x)}")
    theirs = condmod.convert(block, "dit", block.state_dict(), inverse=True)
    print(f"a checkpoint has {len(theirs)} keys, as {next(iter(theirs))}")
