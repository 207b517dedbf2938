"""Starts the forward kernels: which of them, over which blocks, into which memory.

Called with real tensors only; which shapes and layouts come out, `ops` says once more for fakes.
"""

from typing import Any

import torch
import triton.language as tl  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor

from condmod.functional.kernels import layout, sums, tiles
from condmod.functional.kernels.layout import Blocks, Strided
from condmod.functional.kernels.ops import Constants, Operands
from condmod.functional.layout import widest


class Call:
    """What all kernels of one pass share.

    `like` has the shape and dtype of the features, and so has each of `upstream`.
    """

    def __init__(
        self,
        constants: Constants,
        operands: Operands,
        like: Tensor,
        upstream: tuple[Tensor | None, ...] = (),
    ) -> None:
        self.constants = constants
        self.like = like
        self.view = layout.positions(like, constants.channel_dim)
        self.x, self.y = self.strided(operands.x), self.strided(operands.y)
        self.gate, self.scale, self.shift = (
            layout.leaf(part, operands.index, constants.channel_dim)
            for part in (operands.gate, operands.scale, operands.shift)
        )
        self.index = layout.index_argument(operands.index)
        self.wide = widest(like.dtype)
        far = layout.is_far(
            self.view,
            *self.joining,
            self.scale.argument,
            self.shift.argument,
            self.index,
            *map(layout.plain, upstream),
        )
        self.offset = tl.int64 if far else tl.int32

    @property
    def joining(self) -> tuple[Any, ...]:
        """What a kernel reads features from: x, y and the gate."""
        return self.x, self.y, self.gate.argument

    @property
    def gating(self) -> dict[str, Any]:
        """How it reads the gate."""
        return {"gate_mode": self.gate.mode, "gate_plus": self.constants.gate_plus}

    @property
    def scaling(self) -> dict[str, Any]:
        """How it reads the scale."""
        return {"scale_mode": self.scale.mode, "plus": self.constants.plus}

    def strided(self, x: Tensor | None) -> Strided:
        """Features, or a leaf of their shape, as kernels take them."""
        return layout.strided(x, self.constants.channel_dim)

    def blocks(self, tile: Blocks) -> dict[str, Any]:
        """The blocks of a kernel and the dtypes that it computes in."""
        return {
            "wide": tl.float64 if self.wide == torch.float64 else tl.float32,
            "offset": self.offset,
            "block_p": tile.p,
            "block_c": tile.c,
            "num_warps": tile.warps,
        }

    def channel_blocks(self, tile: Blocks) -> int:
        """Into how many blocks the channels fall."""
        return -(-self.view.shape[2] // tile.c)


def forward(call: Call, joined: Tensor | None, out: Tensor | None, stats: Tensor | None) -> None:
    """Fill joined, x + g·y, and out, the modulated norm of it, and the norm's statistics.

    Args:
        call: of a pass with features.
        joined: of the features' shape, or None.
        out: the same.
        stats: means and reciprocal deviations (2, B, P), or (2, B, C) for norm group; None
            without a norm.
    """
    batch, extent, channels = call.view.shape
    constants = call.constants
    given = "none"
    tile = layout.blocks(call.view, narrow=False)
    if stats is not None:
        if constants.norm == "group":
            given = "channel"
            _group_statistics(call, stats)
        elif layout.fits(call.view):
            tile = layout.line_blocks(call.view, narrow=False)
        else:
            given = "position"
            _line_statistics(call, stats)
    parts = -(-extent // tile.p)
    tiles.forward_tile[batch * parts, call.channel_blocks(tile)](
        *call.joining,
        call.scale.argument,
        call.shift.argument,
        call.index,
        call.strided(joined),
        call.strided(out),
        layout.plain(stats),
        extent,
        channels,
        parts,
        shift_mode=call.shift.mode,
        norm=constants.norm,
        given=given,
        eps=constants.eps,
        **call.gating,
        **call.scaling,
        **call.blocks(tile),
    )


def _line_statistics(call: Call, stats: Tensor) -> None:
    batch, extent, channels = call.view.shape
    tile = layout.blocks(call.view, narrow=True)
    parts = -(-extent // tile.p)
    sums.line_statistics[batch * parts,](
        *call.joining,
        call.index,
        layout.plain(stats),
        extent,
        channels,
        parts,
        norm=call.constants.norm,
        eps=call.constants.eps,
        **call.gating,
        **call.blocks(tile),
    )


def _group_statistics(call: Call, stats: Tensor) -> None:
    """Mean and variance of each group from those of its channels' chunks."""
    batch, extent, channels = call.view.shape
    groups = call.constants.groups
    tile = layout.blocks(call.view, narrow=True)
    chunks, span = layout.spans(call.view, tile)
    means, squares = call.view.new_empty((2, batch, chunks, channels), dtype=call.wide)
    sums.channel_statistics[batch * chunks, call.channel_blocks(tile)](
        call.x,
        layout.plain(means),
        layout.plain(squares),
        extent,
        channels,
        chunks,
        span,
        **call.blocks(tile),
    )
    counts = means.new_full((chunks, 1), span)
    counts[-1] = extent - (chunks - 1) * span
    elements = extent * channels // groups
    grouped = (batch, chunks, groups, channels // groups)
    mean = (means * counts).view(grouped).sum((1, 3)) / elements
    spread = (means.view(grouped) - mean[:, None, :, None]).square().view_as(means) * counts
    variance = (squares + spread).view(grouped).sum((1, 3)) / elements
    both = torch.stack((mean, torch.rsqrt(variance + call.constants.eps)))
    stats.copy_(both.repeat_interleave(channels // groups, 2, output_size=channels))
