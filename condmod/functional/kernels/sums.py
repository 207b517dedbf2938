# mypy: ignore-errors
# ruff: noqa: D103  a kernel's line is the comment above it; triton.jit keeps the source text
"""The sums that a tile cannot hold: over a sample, over a long line, over an index's rows."""

import triton
import triton.language as tl

from condmod.functional.kernels.tiles import (
    at,
    features_at,
    leaf_at,
    reciprocal_root,
    rows_of,
    statistic_at,
)


# Sums over positions of g and of g·h, with g the gradient, times the factor if wanted, and h the
# features, normed if there are statistics; of those positions alone whose row is this program's
# where the leaf is indexed. No other position's features are fetched.
@triton.jit
def sum_positions(
    d_out, x, y, gate, scale, index, stats, products, sums,
    extent_p, extent_c, extent_r, chunks, span,
    gate_mode: tl.constexpr, gate_plus: tl.constexpr, scale_mode: tl.constexpr, plus: tl.constexpr,
    given: tl.constexpr, by_row: tl.constexpr,
    wide: tl.constexpr, offset: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(offset)
    chunk = program % chunks
    sample_row = program // chunks
    b = sample_row // extent_r
    r = sample_row % extent_r
    lanes = tl.arange(0, block_p).to(offset)[:, None]
    c = (tl.program_id(1).to(offset) * block_c + tl.arange(0, block_c).to(offset))[None, :]
    if sums is not None:
        total = tl.zeros([block_p, block_c], wide)
    if products is not None:
        product = tl.zeros([block_p, block_c], wide)
    first = chunk * span
    for start in range(first, tl.minimum(first + span, extent_p), block_p):
        p = start + lanes
        row = rows_of(index, b, p, extent_p)
        # Positions out of the sum are put out of the extent, so that every mask below knows them.
        if by_row:
            p = tl.where(row == r, p, extent_p)
        inside = (p < extent_p) & (c < extent_c)
        g = tl.load(at(d_out, b, p, c), mask=inside, other=0.0).to(wide)
        if scale_mode != "none":
            g *= leaf_at(scale, b, p, c, row, extent_p, extent_c, scale_mode, wide) + plus
        if sums is not None:
            total += g
        if products is not None:
            h = features_at(
                x, y, gate, b, p, c, row, extent_p, extent_c, gate_mode, gate_plus, wide
            )
            if given != "none":
                mean = statistic_at(stats, 0, b, p, c, extent_p, extent_c, given)
                h = (h - mean) * statistic_at(stats, 1, b, p, c, extent_p, extent_c, given)
            product += g * h
    if sums is not None:
        tl.store(at(sums, sample_row, chunk, c), tl.sum(total, 0)[None, :], mask=c < extent_c)
    if products is not None:
        tl.store(at(products, sample_row, chunk, c), tl.sum(product, 0)[None, :], mask=c < extent_c)


# Mean and sum of squared deviations of each channel over a chunk of positions, by running means
# (no difference of large sums).
@triton.jit
def channel_statistics(
    x, means, squares,
    extent_p, extent_c, chunks, span,
    wide: tl.constexpr, offset: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(offset)
    b = program // chunks
    chunk = program % chunks
    lanes = tl.arange(0, block_p).to(offset)[:, None]
    c = (tl.program_id(1).to(offset) * block_c + tl.arange(0, block_c).to(offset))[None, :]
    count = tl.zeros([block_p, 1], wide)
    mean = tl.zeros([block_p, block_c], wide)
    square = tl.zeros([block_p, block_c], wide)
    first = chunk * span
    for start in range(first, tl.minimum(first + span, extent_p), block_p):
        p = start + lanes
        inside = (p < extent_p) & (c < extent_c)
        h = tl.load(at(x, b, p, c), mask=inside, other=0.0).to(wide)
        count += tl.where(p < extent_p, 1.0, 0.0).to(wide)
        away = tl.where(inside, h - mean, 0.0)
        mean += away / tl.maximum(count, 1.0)
        square += tl.where(inside, away * (h - mean), 0.0)
    whole = tl.sum(mean * count, 0)[None, :] / tl.sum(count)
    apart = mean - whole
    square = tl.sum(square + count * apart * apart, 0)[None, :]
    tl.store(at(means, b, chunk, c), whole, mask=c < extent_c)
    tl.store(at(squares, b, chunk, c), square, mask=c < extent_c)


# Mean and reciprocal deviation of each position, channel block by channel block.
@triton.jit
def line_statistics(
    x, y, gate, index, stats,
    extent_p, extent_c, tiles,
    gate_mode: tl.constexpr, gate_plus: tl.constexpr, norm: tl.constexpr, eps: tl.constexpr,
    wide: tl.constexpr, offset: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(offset)
    b = program // tiles
    p = (program % tiles * block_p + tl.arange(0, block_p).to(offset))[:, None]
    row = rows_of(index, b, p, extent_p)
    mean = tl.zeros([block_p, 1], wide)
    if norm == "layer":
        total = tl.zeros([block_p, block_c], wide)
        for start in range(0, extent_c, block_c):
            c = (start + tl.arange(0, block_c).to(offset))[None, :]
            total += features_at(
                x, y, gate, b, p, c, row, extent_p, extent_c, gate_mode, gate_plus, wide
            )
        mean = (tl.sum(total, 1) / extent_c)[:, None]
    square = tl.zeros([block_p, block_c], wide)
    for start in range(0, extent_c, block_c):
        c = (start + tl.arange(0, block_c).to(offset))[None, :]
        h = features_at(x, y, gate, b, p, c, row, extent_p, extent_c, gate_mode, gate_plus, wide)
        away = tl.where(c < extent_c, h - mean, 0.0)
        square += away * away
    rstd = reciprocal_root(tl.sum(square, 1) / extent_c + eps)[:, None]
    line = stats[0] + b * stats[2] + p * stats[3]
    tl.store(line, mean, mask=p < extent_p)
    tl.store(line + stats[1], rstd, mask=p < extent_p)


# Mean over the channels of g and of g·h, as the norm's gradient needs, block by block.
@triton.jit
def line_moments(
    d_out, x, y, gate, scale, index, stats, moments,
    extent_p, extent_c, tiles,
    gate_mode: tl.constexpr, gate_plus: tl.constexpr, scale_mode: tl.constexpr, plus: tl.constexpr,
    norm: tl.constexpr,
    wide: tl.constexpr, offset: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(offset)
    b = program // tiles
    p = (program % tiles * block_p + tl.arange(0, block_p).to(offset))[:, None]
    row = rows_of(index, b, p, extent_p)
    level = tl.zeros([block_p, block_c], wide)
    along = tl.zeros([block_p, block_c], wide)
    for start in range(0, extent_c, block_c):
        c = (start + tl.arange(0, block_c).to(offset))[None, :]
        inside = (p < extent_p) & (c < extent_c)
        g = tl.load(at(d_out, b, p, c), mask=inside, other=0.0).to(wide)
        if scale_mode != "none":
            g *= leaf_at(scale, b, p, c, row, extent_p, extent_c, scale_mode, wide) + plus
        h = features_at(x, y, gate, b, p, c, row, extent_p, extent_c, gate_mode, gate_plus, wide)
        mean = statistic_at(stats, 0, b, p, c, extent_p, extent_c, "position")
        h = (h - mean) * statistic_at(stats, 1, b, p, c, extent_p, extent_c, "position")
        level += g
        along += g * h
    line = moments[0] + b * moments[2] + p * moments[3]
    mean_level = (tl.sum(level, 1) / extent_c)[:, None]
    if norm == "rms":
        mean_level = tl.zeros([block_p, 1], wide)
    tl.store(line, mean_level, mask=p < extent_p)
    tl.store(line + moments[1], (tl.sum(along, 1) / extent_c)[:, None], mask=p < extent_p)
