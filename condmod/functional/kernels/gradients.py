"""Starts the backward kernels: sums first where a norm asks for them, then one pass, then rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from condmod.functional.kernels import layout, sums, tiles
from condmod.functional.kernels.launch import Call
from condmod.functional.kernels.layout import Blocks


class Upstream(NamedTuple):
    """The gradients of what the forward pass gave, and the statistics that it left."""

    joined: Tensor | None
    out: Tensor | None
    stats: Tensor | None


class Features(NamedTuple):
    """Where the gradients of the features go, if anybody wants them."""

    x: Tensor | None
    y: Tensor | None


class Leaves(NamedTuple):
    """The gradients of the leaves, or None for who wants none."""

    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


def backward(
    call: Call, upstream: Upstream, features: Features, wanted: tuple[bool, bool, bool]
) -> Leaves:
    """Fill the gradients of the features; give those of the leaves, in their dtypes.

    Args:
        call: with x where the scale or a norm needs it, y where the gate does.
        upstream: at least one gradient.
        features: filled.
        wanted: which of gate, scale and shift somebody wants the gradient of.
    """
    gate_rows = wanted[0] and call.gate.mode == "rows"
    if gate_rows and upstream.out is not None and features.x is None:
        # The rows of a gate are summed from the gradient of what was joined.
        features = features._replace(x=layout.empty_like(call.like, call.constants.channel_dim))
    leaves = _tiles(call, upstream, features, wanted)
    if gate_rows:
        d_joined = upstream.joined if upstream.out is None else features.x
        leaves = leaves._replace(gate=_gate_rows(call, d_joined))
    scale_rows, shift_rows = (
        is_wanted and leaf.mode == "rows"
        for is_wanted, leaf in zip(wanted[1:], (call.scale, call.shift), strict=True)
    )
    if scale_rows or shift_rows:
        return _affine_rows(call, upstream, leaves, scale=scale_rows, shift=shift_rows)
    return leaves


def _tiles(
    call: Call, upstream: Upstream, features: Features, wanted: tuple[bool, bool, bool]
) -> Leaves:
    """All but the gradients of rows."""
    batch, extent, channels = call.view.shape
    through = wanted[0] or features.x is not None or features.y is not None
    given, moments, tile = _moments(call, upstream, through=through)
    modes = [
        leaf.mode if is_wanted else "none"
        for leaf, is_wanted in zip((call.gate, call.scale, call.shift), wanted, strict=True)
    ]
    chunks, span = -(-extent // tile.p), tile.p
    if "global" in modes:
        chunks, span = layout.spans(call.view, tile)
    made: list[Tensor | None] = []
    for leaf, mode in zip((call.gate, call.scale, call.shift), modes, strict=True):
        if mode == "global":
            made.append(call.view.new_empty((batch, chunks, channels), dtype=call.wide))
        elif mode == "aligned":
            made.append(layout.empty_like(leaf.whole(), call.constants.channel_dim))
        else:
            made.append(None)
    tiles.backward_tile[batch * chunks, call.channel_blocks(tile)](
        call.strided(upstream.joined),
        call.strided(upstream.out),
        *call.joining,
        call.scale.argument,
        call.index,
        layout.plain(upstream.stats),
        layout.plain(moments),
        call.strided(features.x),
        call.strided(features.y),
        *(
            layout.plain(part) if mode == "global" else call.strided(part)
            for part, mode in zip(made, modes, strict=True)
        ),
        extent,
        channels,
        chunks,
        span,
        shift_mode=call.shift.mode,
        norm="none" if upstream.out is None else call.constants.norm,
        given=given,
        **call.gating,
        **call.scaling,
        **call.blocks(tile),
    )
    return Leaves(
        *(
            part.sum(1).to(leaf.whole().dtype) if part is not None and mode == "global" else part
            for leaf, part, mode in zip(
                (call.gate, call.scale, call.shift), made, modes, strict=True
            )
        )
    )


def _moments(call: Call, upstream: Upstream, *, through: bool) -> tuple[str, Tensor | None, Blocks]:
    """What statistics are by, the means that a gradient through the norm needs, and the tile.

    No means where a tile holds all that a norm is over.
    """
    norm = call.constants.norm
    tile = layout.blocks(call.view, narrow=True)
    if norm == "none" or upstream.out is None:
        return "none", None, tile
    if norm == "group":
        return "channel", _group_moments(call, upstream) if through else None, tile
    if layout.fits(call.view):
        return "none", None, layout.line_blocks(call.view, narrow=True)
    return "position", _line_moments(call, upstream, tile) if through else None, tile


def _line_moments(call: Call, upstream: Upstream, tile: Blocks) -> Tensor:
    batch, extent, channels = call.view.shape
    moments = call.view.new_empty((2, batch, extent), dtype=call.wide)
    parts = -(-extent // tile.p)
    sums.line_moments[batch * parts,](
        call.strided(upstream.out),
        *call.joining,
        call.scale.argument,
        call.index,
        layout.plain(upstream.stats),
        layout.plain(moments),
        extent,
        channels,
        parts,
        norm=call.constants.norm,
        **call.gating,
        **call.scaling,
        **call.blocks(tile),
    )
    return moments


def _group_moments(call: Call, upstream: Upstream) -> Tensor:
    """Means over each group of g and g·h, (2, B, C), from their sums for each channel."""
    batch, extent, channels = call.view.shape
    groups = call.constants.groups
    width = channels // groups
    level, along = _sums(call, upstream, scaled=call.scale.mode in {"aligned", "rows"})
    both = torch.stack((level, along))[:, :, 0]
    if call.scale.mode == "global":
        both = both * (call.scale.whole().to(call.wide) + call.constants.plus)
    means = both.view(2, batch, groups, width).sum(-1) / (width * extent)
    return means.repeat_interleave(width, 2, output_size=channels)


def _affine_rows(
    call: Call, upstream: Upstream, leaves: Leaves, *, scale: bool, shift: bool
) -> Leaves:
    rows = (call.scale if scale else call.shift).whole().shape[1]
    d_shift, d_scale = _sums(call, upstream, rows, products=scale)
    if scale:
        leaves = leaves._replace(scale=d_scale.to(call.scale.whole().dtype))
    if shift:
        leaves = leaves._replace(shift=d_shift.to(call.shift.whole().dtype))
    return leaves


def _gate_rows(call: Call, d_joined: Tensor | None) -> Tensor:
    gate = call.gate.whole()
    _, products = _sums(call, Upstream(None, d_joined, None), gate.shape[1], branch=True)
    return products.to(gate.dtype)


def _sums(
    call: Call,
    upstream: Upstream,
    rows: int | None = None,
    *,
    scaled: bool = False,
    branch: bool = False,
    products: bool = True,
) -> tuple[Tensor, Tensor]:
    """Sums over positions of g and g·h, (B, rows or 1, C), in the dtype to compute in.

    Args:
        call: the pass.
        upstream: g is the gradient of `out`; h is normed by `stats`.
        rows: sum over the positions of each of so many rows.
        scaled: g is times the factor.
        branch: h is the sublayer's output, not the features.
        products: make the second; else it is as the first.
    """
    batch, extent, channels = call.view.shape
    tile = layout.blocks(call.view, narrow=True)
    chunks, span = layout.spans(call.view, tile, rows or 1)
    parts = call.view.new_empty(
        (1 + products, batch * (rows or 1), chunks, channels), dtype=call.wide
    )
    given = "none"
    if upstream.stats is not None:
        given = "channel" if call.constants.norm == "group" else "position"
    sums.sum_positions[parts.shape[1] * chunks, call.channel_blocks(tile)](
        call.strided(upstream.out),
        *((call.y, None, None) if branch else call.joining),
        call.scale.argument,
        call.index,
        layout.plain(upstream.stats),
        layout.plain(parts[1]) if products else None,
        layout.plain(parts[0]),
        extent,
        channels,
        rows or 1,
        chunks,
        span,
        scale_mode=call.scale.mode if scaled else "none",
        plus=call.constants.plus,
        given=given,
        by_row=rows is not None,
        **call.gating,
        **call.blocks(tile),
    )
    # Summed one by one: what an operator gives back must not share memory.
    first, *last = (part.sum(1).view(batch, rows or 1, channels) for part in parts)
    return first, last[0] if last else first
