"""The transformer computes what its docstrings say, written out once more by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from condmod_lab.config import make_config
from condmod_lab.errors import ConfigError
from condmod_lab.network import build
from condmod_lab.places import generate
from condmod_lab.transformer import Attention, TransformerBlock, TransformerBody, positions

CPU = torch.device("cpu")


def body(modulator: str, **section: object) -> TransformerBody:
    small = {"name": "transformer", "channels": 8, "blocks": 2, "heads": 2, "condition_dim": 4}
    config = make_config({"modulator": modulator, "backbone": {**small, **section}})
    found = build(config, 10, (1, 4, 6)).body
    assert isinstance(found, TransformerBody)
    return found.double()


def norm(x: Tensor) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-6).sqrt()


def attend(attention: Attention, x: Tensor) -> Tensor:
    """Softmax attention, a head at a time."""
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    width = x.shape[-1] // attention.heads
    heads = []
    for start in range(0, x.shape[-1], width):
        part = slice(start, start + width)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(width)
        heads.append(scores.softmax(dim=-1) @ v[..., part])
    return attention.out(torch.cat(heads, dim=-1))


def feed(block: TransformerBlock, x: Tensor) -> Tensor:
    first, _, second = block.feedforward
    return second(F.gelu(first(x)))


def by_hand(net: TransformerBody, x: Tensor, c: Tensor, patch: int) -> Tensor:
    """The body with `film` at every place."""
    rows, columns = range(0, x.shape[2], patch), range(0, x.shape[3], patch)
    corners = [(top, left) for top in rows for left in columns]
    patches = [x[:, :, top : top + patch, left : left + patch].flatten(1) for top, left in corners]
    h = net.entry(torch.stack(patches, dim=1))
    h = h + positions(len(rows), len(columns), h.shape[-1], CPU)
    for index, block in enumerate(net.blocks):
        for part in ("attention", "feedforward"):
            modulator = net.bank[f"blocks.{index}.{part}"]
            scale, shift = modulator.proj(c)[:, None].chunk(2, dim=-1)
            read = scale * norm(h) + shift
            h = h + (attend(block.attention, read) if part == "attention" else feed(block, read))
    out = torch.empty_like(x)
    for (top, left), values in zip(corners, net.exit(norm(h)).unbind(dim=1), strict=True):
        square = values.reshape(len(x), x.shape[1], patch, patch)
        out[:, :, top : top + patch, left : left + patch] = square
    return out


@pytest.mark.parametrize("patch", [1, 2])
def test_a_plain_modulator_gives_x_plus_the_sublayer_of_the_modulated_norm(patch: int) -> None:
    net = body("film", patch=patch)
    x, c = torch.randn(3, 1, 4, 6).double(), torch.randn(3, 4).double()
    torch.testing.assert_close(net(x, c), by_hand(net, x, c, patch), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_modulator_around_sublayers_stands_around_each_of_them(parts: int) -> None:
    net = body(f"adaln_zero(parts={parts})", blocks=1)
    block = net.blocks[0]
    assert isinstance(block, TransformerBlock)
    assert len(net.bank) == 2 // parts
    for parameter in net.bank.parameters():
        torch.nn.init.normal_(parameter)
    x, c = torch.randn(3, 6, 8).double(), torch.randn(3, 4).double()
    projected = torch.cat([net.bank[name].proj(F.silu(c)) for name in net.bank], dim=-1)
    shift, scale, gate, shift2, scale2, gate2 = projected[:, None].chunk(6, dim=-1)
    h = x + gate * attend(block.attention, (1 + scale) * norm(x) + shift)
    h = h + gate2 * feed(block, (1 + scale2) * norm(h) + shift2)
    torch.testing.assert_close(block(x, generate(net.bank, x, c)), h)


def test_the_sites_are_named_and_channels_last() -> None:
    names = {
        modulator: list(body(modulator).bank)
        for modulator in ("film", "adaln_zero(parts=1)", "adaln_zero")
    }
    each = [f"blocks.{index}.{part}" for index in (0, 1) for part in ("attention", "feedforward")]
    assert names == {
        "film": each,
        "adaln_zero(parts=1)": each,
        "adaln_zero": ["blocks.0", "blocks.1"],
    }
    assert body("film").bank["blocks.0.attention"].site.channel_dim == -1


def test_positions_are_sinusoids_of_row_and_column() -> None:
    found = positions(2, 3, 8, CPU)
    for row in range(2):
        for column in range(3):
            expected = [
                wave(omega * place)
                for omega in (1.0, 0.01)
                for wave in (math.sin, math.cos)
                for place in (row, column)
            ]
            assert found[3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("channels", [2, 5, 6])
def test_any_width_tells_every_position_apart(channels: int) -> None:
    assert len(positions(4, 4, channels, CPU).unique(dim=0)) == 16


def test_a_patch_that_does_not_divide_the_image_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        body("film", patch=3)
    assert str(caught.value) == (
        "backbone.patch (3) must divide the sides of the images; got images of 4x6"
    )
