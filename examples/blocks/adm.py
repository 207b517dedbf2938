"""ADM's residual block: ada_group_norm between two convolutions, names as published.

python examples/blocks/adm.py
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

import condmod


class Block(nn.Module):
    """skip(x) + conv(silu((1 + scale)·GN(h) + shift)) with h = conv(silu(GN(x))).

    Args:
        features: channels of x.
        condition_dim: D, of the condition.
        out_features: channels of the output; None: as many. Where they differ, skip is a 1×1
            convolution.
        resize: halve both sides by averaging ("down") or double them ("up"), before the first
            convolution and on the skip.
        groups: of both norms.
        dropout: before the second convolution.
    """

    def __init__(
        self,
        features: int,
        condition_dim: int,
        out_features: int | None = None,
        *,
        resize: Literal["down", "up"] | None = None,
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        wide = out_features or features
        conv = nn.Conv2d(features, wide, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, features), nn.SiLU(), conv)
        self.modulator = condmod.create(
            f"ada_group_norm({groups=})",
            features=wide,
            condition_dim=condition_dim,
            channel_dim=1,
        )
        conv = nn.Conv2d(wide, wide, 3, padding=1)
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
        # A checkpoint has the norm at 0, which is the modulator's here, and the convolution at 3.
        self.out_layers = nn.Sequential(nn.Identity(), nn.SiLU(), nn.Dropout(dropout), conv)
        self.skip_connection = nn.Identity() if wide == features else nn.Conv2d(features, wide, 1)
        self.resize = {
            None: nn.Identity(),
            "down": nn.AvgPool2d(2),
            "up": nn.Upsample(scale_factor=2, mode="nearest"),
        }[resize]

    def forward(
        self, x: Float[Tensor, "B C H W"], condition: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B E h w"]:
        """A map to a map."""
        h = self.in_layers[2](self.resize(self.in_layers[:2](x)))
        y: Tensor = self.out_layers(self.modulator(h, condition))
        return self.skip_connection(self.resize(x)) + y


if __name__ == "__main__":
    encoder = condmod.create_encoder("timestep(hidden=[128])", out_dim=128)
    x, condition = torch.randn(2, 64, 16, 16), encoder(torch.tensor([17, 403]))
    for block in (Block(64, 128), Block(64, 128, 96), Block(64, 128, resize="down")):
        print(f"{tuple(x.shape)} to {tuple(block(x, condition).shape)}")
    print(f"at the start y is x: {torch.equal(Block(64, 128)(x, condition), x)}")
    theirs = condmod.convert(block, "adm", block.state_dict(), inverse=True)
    print(f"a checkpoint has {len(theirs)} keys, as {next(iter(theirs))}")
