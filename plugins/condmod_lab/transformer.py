"""A transformer body: attention and feed-forward over patches of an image, channels last."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from condmod import Bank, Condition, ModulatorSpec, Site, SublayerModulator
from condmod.functional import layer_norm
from condmod_lab.errors import ConfigError
from condmod_lab.places import Place, check_parts, fill, generate
from condmod_lab.sections import TransformerConfig


class Attention(nn.Module):
    """Self-attention of several heads over all positions, (B, T, C) to (B, T, C)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Every position reads all positions of its sample."""
        q, k, v = rearrange(self.qkv(x), "b t (n h c) -> n b h t c", n=3, h=self.heads)
        read = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.out(rearrange(read, "b h t c -> b t (h c)")))


class FeedForward(nn.Sequential):
    """Linear, GELU, Linear at every position, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )


class TransformerBlock(nn.Module):
    """Attention and feed-forward, two sublayers, each with a residual.

    A modulator of features stands before each sublayer, x + sublayer(mod(LN(x), c)), where LN has
    no parameters. A modulator around sublayers brings its own norm and residual: with one part
    each sublayer has one, with two parts one serves both.
    """

    def __init__(self, section: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(section.channels, section.heads)
        self.feedforward = FeedForward(section.channels)

    def forward(self, x: Float[Tensor, "B T C"], places: Sequence[Place]) -> Float[Tensor, "B T C"]:
        """Tokens to tokens of the same shape, by one place for each sublayer or for both."""
        sublayers = (self.attention, self.feedforward)
        if len(places) == 1:
            modulator, modulation = places[0]
            assert isinstance(modulator, SublayerModulator)
            return modulator.around(x, modulation, *sublayers)
        for (modulator, modulation), sublayer in zip(places, sublayers, strict=True):
            if isinstance(modulator, SublayerModulator):
                x = modulator.around(x, modulation, sublayer)
            else:
                x = x + sublayer(modulator.modulate(layer_norm(x), modulation))
        return x


class TransformerBody(nn.Module):
    """Images to images through transformer blocks over patches; every sublayer is a place.

    Args:
        spec: what fills every place.
        section: width, depth and the patches' side.
        shape: of one image, (C, H, W).

    Raises:
        ConfigError: the patches do not divide the image.
        SiteError: the modulator does not fit a place; says which and why.
    """

    def __init__(
        self, spec: ModulatorSpec, section: TransformerConfig, shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        image_channels, height, width = shape
        self.patch = section.patch
        if height % self.patch or width % self.patch:
            raise ConfigError(
                f"backbone.patch ({self.patch}) must divide the sides of the images; "
                f"got images of {height}x{width}"
            )
        values = image_channels * self.patch**2
        self.entry = nn.Linear(values, section.channels)
        self.bank = _fill(spec, section)
        self.blocks = nn.ModuleList(TransformerBlock(section) for _ in range(section.blocks))
        # not zero as in DiT: behind branches that adaLN-Zero closes, it would leave the gates
        # without a gradient in the first step, and so scale, shift and sublayers in the second
        self.exit = nn.Linear(section.channels, values)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        condition: Condition,
        made: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Images (B, C, H, W) and what the places take, or have made, to images of that shape."""
        patches = rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=self.patch, q=self.patch)
        _, height, width, _ = patches.shape
        tokens = self.entry(patches.flatten(1, 2))
        waves = positions(height, width, tokens.shape[-1], x.device)
        tokens = tokens + waves.to(self.entry.weight.dtype)
        places = generate(self.bank, tokens, condition, made)
        each = len(places) // len(self.blocks)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, places[each * index : each * (index + 1)])
        values = self.exit(layer_norm(tokens)).unflatten(1, (height, width))
        grid = "b h w (c p q) -> b c (h p) (w q)"
        return cast(Tensor, rearrange(values, grid, p=self.patch, q=self.patch))


def positions(height: int, width: int, channels: int, device: torch.device) -> Float[Tensor, "T C"]:
    """Sinusoids of each patch's row y and column x, T = height·width.

    The channels are sin(ω·y), sin(ω·x), cos(ω·y), cos(ω·x) for each ω = 10000^(-i/n) in turn,
    with n = channels / 4, rounded up. They are computed anew at each pass: a buffer would have
    to be filled again after `to_empty`.
    """
    count = -(-channels // 4)
    omega = 10000.0 ** (-torch.arange(count, device=device) / count)
    y = torch.arange(height, device=device).repeat_interleave(width)[:, None] * omega
    x = torch.arange(width, device=device).repeat(height)[:, None] * omega
    return torch.stack((y.sin(), x.sin(), y.cos(), x.cos()), dim=-1).flatten(1)[:, :channels]


def _fill(spec: ModulatorSpec, section: TransformerConfig) -> Bank:
    """One modulator for each sublayer of each block, or one that serves both."""
    site = Site(section.channels, section.condition_dim)
    blocks = [f"blocks.{index}" for index in range(section.blocks)]
    sublayers = [f"{block}.{part}" for block in blocks for part in ("attention", "feedforward")]
    bank = fill(spec, site, sublayers)
    modulator = bank[sublayers[0]]
    if isinstance(modulator, SublayerModulator) and modulator.parts > 1:
        bank = fill(spec, site, blocks)
        check_parts(bank, "two sublayers, attention and feed-forward")
    return bank
