# mypy: ignore-errors
# ruff: noqa: D103  a kernel's line is the comment above it; triton.jit keeps the source text
"""The two passes over the features, in Triton: everything forward, everything backward.

A tensor is a tuple (pointer, stride of the sample, of the position, of the channel), so one kernel
serves channels first, channels last, and views into a projection. A global leaf has no position
stride, an indexed one has the stride of its rows there. A tile is positions by channels.
"""

import triton
import triton.language as tl


@triton.jit
def at(tensor, b, p, c):
    return tensor[0] + b * tensor[1] + p * tensor[2] + c * tensor[3]


# The rows of the positions p; where nothing is indexed it costs nothing.
@triton.jit
def rows_of(index, b, p, extent_p):
    row = None
    if index is not None:
        row = tl.load(index[0] + b * index[1] + p * index[2], mask=p < extent_p, other=0)
    return row


# Rounded in float64, where tl.rsqrt is an approximation on a GPU. It is made once a line.
@triton.jit
def reciprocal_root(value):
    return 1.0 / tl.sqrt(value)


# A tile of a leaf, or one line of it where it is global.
@triton.jit
def leaf_at(leaf, b, p, c, row, extent_p, extent_c, mode: tl.constexpr, wide: tl.constexpr):
    if mode == "global":
        value = tl.load(at(leaf, b, 0, c), mask=c < extent_c, other=0.0).to(wide)
    elif mode == "aligned":
        inside = (p < extent_p) & (c < extent_c)
        value = tl.load(at(leaf, b, p, c), mask=inside, other=0.0).to(wide)
    else:
        # A row that is not there gives NaN: loud, and without waiting for the device.
        inside = (p < extent_p) & (c < extent_c)
        known = (row >= 0) & (row < leaf[4])
        found = tl.load(at(leaf, b, row.to(p.dtype), c), mask=inside & known, other=0.0).to(wide)
        value = tl.where(inside & (known == 0), float("nan"), found)
    return value


# x, or x + (plus + gate)·y.
@triton.jit
def features_at(
    x, y, gate, b, p, c, row, extent_p, extent_c,
    gate_mode: tl.constexpr, gate_plus: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    inside = (p < extent_p) & (c < extent_c)
    h = tl.load(at(x, b, p, c), mask=inside, other=0.0).to(wide)
    if y is not None:
        branch = tl.load(at(y, b, p, c), mask=inside, other=0.0).to(wide)
        value = leaf_at(gate, b, p, c, row, extent_p, extent_c, gate_mode, wide)
        h += (value + gate_plus) * branch
    return h


# Means (which=0) or reciprocal deviations (which=1), of each position or of each channel.
@triton.jit
def statistic_at(stats, which: tl.constexpr, b, p, c, extent_p, extent_c, per: tl.constexpr):
    if per == "channel":
        value = tl.load(
            stats[0] + which * stats[1] + b * stats[2] + c * stats[3], mask=c < extent_c, other=0.0
        )
    else:
        value = tl.load(
            stats[0] + which * stats[1] + b * stats[2] + p * stats[3], mask=p < extent_p, other=0.0
        )
    return value


@triton.jit
def forward_tile(
    x, y, gate, scale, shift, index, joined, out, stats,
    extent_p, extent_c, tiles,
    gate_mode: tl.constexpr, gate_plus: tl.constexpr, scale_mode: tl.constexpr, plus: tl.constexpr,
    shift_mode: tl.constexpr, norm: tl.constexpr, given: tl.constexpr, eps: tl.constexpr,
    wide: tl.constexpr, offset: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(offset)
    b = program // tiles
    p = (program % tiles * block_p + tl.arange(0, block_p).to(offset))[:, None]
    c = (tl.program_id(1).to(offset) * block_c + tl.arange(0, block_c).to(offset))[None, :]
    inside = (p < extent_p) & (c < extent_c)
    row = rows_of(index, b, p, extent_p)
    h = features_at(x, y, gate, b, p, c, row, extent_p, extent_c, gate_mode, gate_plus, wide)
    if joined is not None:
        tl.store(at(joined, b, p, c), h.to(joined[0].dtype.element_ty), mask=inside)
    if out is not None:
        if given != "none":
            mean = statistic_at(stats, 0, b, p, c, extent_p, extent_c, given)
            h = (h - mean) * statistic_at(stats, 1, b, p, c, extent_p, extent_c, given)
        elif norm != "none":
            mean = tl.zeros([block_p, 1], wide)
            if norm == "layer":
                mean = (tl.sum(h, 1) / extent_c)[:, None]
                h = tl.where(inside, h - mean, 0.0)
            rstd = reciprocal_root(tl.sum(h * h, 1) / extent_c + eps)[:, None]
            h *= rstd
            line = stats[0] + b * stats[2] + p * stats[3]
            tl.store(line, mean, mask=p < extent_p)
            tl.store(line + stats[1], rstd, mask=p < extent_p)
        if scale_mode != "none":
            h *= leaf_at(scale, b, p, c, row, extent_p, extent_c, scale_mode, wide) + plus
        if shift_mode != "none":
            h += leaf_at(shift, b, p, c, row, extent_p, extent_c, shift_mode, wide)
        tl.store(at(out, b, p, c), h.to(out[0].dtype.element_ty), mask=inside)


# A program goes through `span` positions. Gradients of global leaves are summed over them and
# stored once, in the place (b, program, c) of a partial sum; those of aligned leaves are stored as
# they come; those of indexed leaves are not made here.
@triton.jit
def backward_tile(
    d_joined, d_out, x, y, gate, scale, index, stats, moments, dx, dy, dgate, dscale, dshift,
    extent_p, extent_c, chunks, span,
    gate_mode: tl.constexpr, gate_plus: tl.constexpr, scale_mode: tl.constexpr, plus: tl.constexpr,
    shift_mode: tl.constexpr, norm: tl.constexpr, given: tl.constexpr,
    wide: tl.constexpr, offset: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(offset)
    b = program // chunks
    chunk = program % chunks
    lanes = tl.arange(0, block_p).to(offset)[:, None]
    c = (tl.program_id(1).to(offset) * block_c + tl.arange(0, block_c).to(offset))[None, :]
    sum_gate: tl.constexpr = dgate is not None and gate_mode == "global"
    sum_scale: tl.constexpr = dscale is not None and scale_mode == "global"
    sum_shift: tl.constexpr = dshift is not None and shift_mode == "global"
    if sum_gate:
        gate_sum = tl.zeros([block_p, block_c], wide)
    if sum_scale:
        scale_sum = tl.zeros([block_p, block_c], wide)
    if sum_shift:
        shift_sum = tl.zeros([block_p, block_c], wide)
    # What is the same for all positions is read once, before the loop.
    if scale_mode == "global":
        factor = leaf_at(scale, b, 0, c, None, extent_p, extent_c, "global", wide) + plus
    if gate_mode == "global" and dy is not None:
        opening = leaf_at(gate, b, 0, c, None, extent_p, extent_c, "global", wide) + gate_plus
    first = chunk * span
    for start in range(first, tl.minimum(first + span, extent_p), block_p):
        p = start + lanes
        inside = (p < extent_p) & (c < extent_c)
        row = rows_of(index, b, p, extent_p)
        gradient = tl.zeros([block_p, block_c], wide)
        if d_out is not None:
            upstream = tl.load(at(d_out, b, p, c), mask=inside, other=0.0).to(wide)
            if x is not None:
                h = features_at(
                    x, y, gate, b, p, c, row, extent_p, extent_c, gate_mode, gate_plus, wide
                )
                if norm != "none":
                    per: tl.constexpr = given if given != "none" else "position"
                    mean = statistic_at(stats, 0, b, p, c, extent_p, extent_c, per)
                    rstd = statistic_at(stats, 1, b, p, c, extent_p, extent_c, per)
                    h = (h - mean) * rstd
            gradient = upstream
            if scale_mode == "global":
                gradient *= factor
            elif scale_mode != "none":
                gradient *= (
                    leaf_at(scale, b, p, c, row, extent_p, extent_c, scale_mode, wide) + plus
                )
            if norm != "none" and (dx is not None or dy is not None or dgate is not None):
                if given != "none":
                    along = statistic_at(moments, 1, b, p, c, extent_p, extent_c, given)
                    level = statistic_at(moments, 0, b, p, c, extent_p, extent_c, given)
                    gradient -= level + h * along
                else:
                    along = (tl.sum(gradient * h, 1) / extent_c)[:, None]
                    if norm == "layer":
                        gradient -= (tl.sum(gradient, 1) / extent_c)[:, None]
                    gradient -= h * along
                gradient *= rstd
            if dscale is not None:
                if sum_scale:
                    scale_sum += upstream * h
                else:
                    tl.store(
                        at(dscale, b, p, c),
                        (upstream * h).to(dscale[0].dtype.element_ty),
                        mask=inside,
                    )
            if dshift is not None:
                if sum_shift:
                    shift_sum += upstream
                else:
                    tl.store(
                        at(dshift, b, p, c), upstream.to(dshift[0].dtype.element_ty), mask=inside
                    )
        if d_joined is not None:
            gradient += tl.load(at(d_joined, b, p, c), mask=inside, other=0.0).to(wide)
        if dx is not None:
            tl.store(at(dx, b, p, c), gradient.to(dx[0].dtype.element_ty), mask=inside)
        if dgate is not None:
            # Read again where the features were joined: it is in the first cache by then.
            branch = tl.load(at(y, b, p, c), mask=inside, other=0.0).to(wide)
            if sum_gate:
                # Channels out of the norm's extent hold its mean's share, times a branch of zero.
                gate_sum += gradient * branch
            else:
                tl.store(
                    at(dgate, b, p, c), (gradient * branch).to(dgate[0].dtype.element_ty),
                    mask=inside,
                )  # fmt: skip
        if dy is not None:
            if gate_mode != "global":
                opening = (
                    leaf_at(gate, b, p, c, row, extent_p, extent_c, gate_mode, wide) + gate_plus
                )
            tl.store(at(dy, b, p, c), (gradient * opening).to(dy[0].dtype.element_ty), mask=inside)
    if sum_gate:
        tl.store(at(dgate, b, chunk, c), tl.sum(gate_sum, 0)[None, :], mask=c < extent_c)
    if sum_scale:
        tl.store(at(dscale, b, chunk, c), tl.sum(scale_sum, 0)[None, :], mask=c < extent_c)
    if sum_shift:
        tl.store(at(dshift, b, chunk, c), tl.sum(shift_sum, 0)[None, :], mask=c < extent_c)
