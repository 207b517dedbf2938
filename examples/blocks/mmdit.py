"""MM-DiT's double-stream block, as in SD3: mmdit on each stream, one attention for both.

python examples/blocks/mmdit.py
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

import condmod
from condmod.functional import ScaleShiftGate


class FeedForward(nn.Module):
    """Two layers, four times as wide between."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, x: Float[Tensor, "B T C"]) -> Tensor:
        """Tokens to tokens."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return y


class Stream(nn.Module):
    """What image and text have each for itself, names as published.

    Args:
        features: C, of the tokens and of the condition.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.modulator = condmod.create("mmdit", features=features, condition_dim=features)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(features, 3 * features), "proj": nn.Linear(features, features)}
        )
        self.mlp = FeedForward(features)

    def enter(self, x: Tensor, part: ScaleShiftGate) -> Tensor:
        """Queries, keys and values, (B, T, 3·C)."""
        qkv: Tensor = self.attn["qkv"](self.modulator.enter(x, part, None))
        return qkv

    def exit(self, x: Tensor, y: Tensor, parts: tuple[ScaleShiftGate, ...]) -> Tensor:
        """The tokens with what they attended to, and the feed-forward behind."""
        first, second = parts
        x = self.modulator.exit(x, self.attn["proj"](y), first, None)
        y = self.mlp(self.modulator.enter(x, second, None))
        return self.modulator.exit(x, y, second, None)


class Block(nn.Module):
    """For both streams: x + gate·f((1 + scale)·LN(x) + shift), f the joint attention, then an MLP.

    Args:
        features: C, of the tokens of both streams and of the condition.
        heads: of the attention.
    """

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.x_block, self.context_block = Stream(features), Stream(features)

    def forward(
        self,
        image: Float[Tensor, "B T C"],
        text: Float[Tensor, "B S C"],
        condition: Float[Tensor, "B C"],
    ) -> tuple[Tensor, Tensor]:
        """Image and text to image and text."""
        one, other = self.x_block, self.context_block
        parts, others = one.modulator.generate(condition), other.modulator.generate(condition)
        qkv = torch.cat([one.enter(image, parts[0]), other.enter(text, others[0])], 1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y, y_text = attended.split([image.shape[1], text.shape[1]], 1)
        return one.exit(image, y, parts), other.exit(text, y_text, others)


if __name__ == "__main__":
    encoder = condmod.create_encoder(
        "fuse(inputs={'time': timestep(hidden=[64]), 'text': vector(features=32, hidden=[64])})",
        out_dim=64,
    )
    condition = encoder({"time": torch.tensor([17, 403]), "text": torch.randn(2, 32)})
    block, image, text = Block(64, heads=4), torch.randn(2, 16, 64), torch.randn(2, 5, 64)
    y, y_text = block(image, text, condition)
    print(f"image {tuple(y.shape)}, text {tuple(y_text.shape)}")
    moved = (block(image, text.flip(0), condition)[0] - y).abs().max()
    print(f"another text moves the image by up to {moved:.2g}")
    theirs = condmod.convert(block, "sd3", block.state_dict(), inverse=True)
    print(f"a checkpoint has {len(theirs)} keys, as {next(iter(theirs))}")
