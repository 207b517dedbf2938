"""How features and leaves look to a kernel: samples, positions, channels, and their blocks."""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Mode = Literal["none", "global", "aligned", "rows"]
Strided = tuple[Any, ...] | None  # a tensor and its strides

_TILE = 4096  # elements that a program of the forward pass holds: 16 a thread in eight warps
_NARROW = 2048  # the same for sums and gradients, which hold several tiles at once
_LONGEST = 8192  # what a norm may hold of a line; a longer one is summed block by block
# A sum over positions has programs enough for every multiprocessor, `_MANY` if each then still has
# `_LONG` positions (its partial sums are a few percent of what it reads), else `_FEW`; and never
# fewer than `_SHORT` positions each, so that the partial sums are not activation-sized.
_MANY, _FEW = 2048, 512
_LONG, _SHORT = 32, 8
_SEGMENT = 16  # neighbouring positions that one read of channels-first memory covers at least


class Blocks(NamedTuple):
    """A tile of positions by channels, and the warps that hold it."""

    p: int
    c: int
    warps: int


class Leaf(NamedTuple):
    """A part of a modulation: how it varies, itself, and as kernels take it."""

    mode: Mode
    tensor: Tensor | None
    argument: Strided

    def whole(self) -> Tensor:
        """The tensor of a leaf that is there."""
        assert self.tensor is not None
        return self.tensor


def mode_of(leaf: Tensor | None, index: Tensor | None) -> Mode:
    """How a leaf varies: 2-D is global, any other is indexed if there is an index, or aligned."""
    if leaf is None:
        return "none"
    if leaf.ndim == 2:
        return "global"
    return "aligned" if index is None else "rows"


def positions(x: Tensor, channel_dim: int) -> Tensor:
    """(B, P, C), a view where the positions have one stride."""
    if x.ndim == 3:  # the usual case, at a third of the time on the host
        return x if channel_dim == -1 else x.transpose(1, 2)
    last = x.movedim(1, -1) if channel_dim == 1 else x
    return last.reshape(last.shape[0], math.prod(last.shape[1:-1]), last.shape[-1])


def strided(x: Tensor | None, channel_dim: int = -1) -> Strided:
    """Features, or a leaf of their shape, as kernels take them."""
    if x is None:
        return None
    view = positions(x, channel_dim)
    return view, *view.stride()


def leaf(part: Tensor | None, index: Tensor | None, channel_dim: int) -> Leaf:
    """A leaf as kernels take it: a global one has no position, an indexed one has rows there."""
    mode = mode_of(part, index)
    if part is None or mode == "aligned":
        return Leaf(mode, part, strided(part, channel_dim))
    if mode == "global":
        return Leaf(mode, part, (part, part.stride(0), 0, part.stride(1)))
    return Leaf(mode, part, (part, *part.stride(), part.shape[1]))


def index_argument(index: Tensor | None) -> Strided:
    """The rows of the positions, (B, P)."""
    if index is None:
        return None
    flat = index.reshape(index.shape[0], math.prod(index.shape[1:]))
    return flat, *flat.stride()


def empty_like(x: Tensor, channel_dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """An output for x, whose positions have one stride; channels-last memory stays so."""
    if channel_dim == 1 and not x.is_contiguous() and x.stride(1) == 1:
        batch, channels, *rest = x.shape
        return x.new_empty((batch, *rest, channels), dtype=dtype).movedim(-1, 1)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def plain(x: Tensor | None) -> Strided:
    """A tensor and its strides."""
    return None if x is None else (x, *x.stride())


def is_far(features: Tensor, *arguments: Strided) -> bool:
    """Whether an offset, or a block beyond the end, may need more than 32 bits."""
    extents: list[int] = [
        sum(size * step for size, step in zip(part[0].shape, part[0].stride(), strict=True))
        for part in arguments
        if part is not None
    ]
    return max([features.numel(), *extents]) >= 2**30


def fits(view: Tensor) -> bool:
    """Whether one tile holds all channels of a position, so that a norm needs no pass before."""
    return _segment(view) * _power(view.shape[2]) <= _LONGEST


def line_blocks(view: Tensor, *, narrow: bool) -> Blocks:
    """The tile of a norm over the channels, which holds all of them."""
    tile = _NARROW if narrow else _TILE
    c = _power(view.shape[2])
    p = min(max(tile // c, _segment(view)), _power(view.shape[1]))
    return _blocks(p, c, narrow=narrow)


def blocks(view: Tensor, *, narrow: bool) -> Blocks:
    """The tile of an elementwise pass or of a sum; long where memory is contiguous."""
    tile = _NARROW if narrow else _TILE
    if _first(view):
        p = _least_padded(view.shape[1])
        c = min(tile // p, _power(view.shape[2]))
    else:
        c = _least_padded(view.shape[2])
        p = min(tile // c, _power(view.shape[1]))
    return _blocks(p, c, narrow=narrow)


def spans(view: Tensor, tile: Blocks, rows: int = 1) -> tuple[int, int]:
    """Into how many chunks a sum divides the positions, and how many positions each has."""
    batch, extent, channels = view.shape
    work = batch * rows * extent * -(-channels // tile.c)
    span = max(-(-work // _MANY), min(-(-work // _FEW), _LONG), min(extent, _SHORT * rows))
    span = -(-span // tile.p) * tile.p
    return -(-extent // span), span


def _blocks(p: int, c: int, *, narrow: bool) -> Blocks:
    # A sum or a gradient holds half as many elements a thread: it has twice the tiles.
    return Blocks(p, c, min(max(p * c // (256 if narrow else 512), 1), 16))


def _first(view: Tensor) -> bool:
    return view.stride(1) == 1 and view.stride(2) != 1


def _segment(view: Tensor) -> int:
    return min(_SEGMENT, _power(view.shape[1])) if _first(view) else 1


def _least_padded(extent: int) -> int:
    """The longest block up to 1024 of which the last wastes less than an eighth of the line."""
    block = min(1024, _power(extent))
    while block > 128 and -extent % block * 8 > extent:
        block //= 2
    return block


def _power(extent: int) -> int:
    return 1 << max(extent - 1, 0).bit_length()
