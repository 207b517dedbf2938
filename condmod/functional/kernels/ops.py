# ruff: noqa: ARG001  a fake takes what its operator takes
"""The passes as operators of torch, with gradients, known to compile, export and fake tensors.

Custom ops, not `triton_op`: that one traces into the launch, and the interpreter, by which the
kernels run on a CPU, cannot be traced. Triton is imported when an op first runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from condmod.functional.kernels import layout
from condmod.functional.layout import widest


class Constants(NamedTuple):
    """How one pass reads its modulation."""

    channel_dim: int
    norm: str = "none"
    groups: int = 1
    eps: float = 0.0
    gate_plus: float = 0.0
    plus: float = 0.0


class Operands(NamedTuple):
    """What a pass reads; parts that it does not have, or not need again, are None."""

    x: Tensor | None
    y: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index


@torch.library.custom_op("condmod::gate_residual", mutates_args=())
def gate_residual(
    x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None, channel_dim: int, gate_plus: float
) -> Tensor:
    """x + (gate_plus + gate)·y."""
    joined = layout.empty_like(x, channel_dim)
    operands = Operands(x, y, gate, None, None, index)
    _run(Constants(channel_dim, gate_plus=gate_plus), operands, joined, None, None)
    return joined


@torch.library.custom_op("condmod::norm_affine", mutates_args=())
def norm_affine(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    channel_dim: int,
    plus: float,
    norm: str,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(plus + scale)·norm(x) + shift, and the norm's statistics."""
    out = layout.empty_like(x, channel_dim)
    stats = _statistics(x, channel_dim, norm)
    operands = Operands(x, None, None, scale, shift, index)
    _run(Constants(channel_dim, norm, groups, eps, 0.0, plus), operands, None, out, stats)
    return out, stats


@torch.library.custom_op("condmod::gate_residual_norm_affine", mutates_args=())
def gate_residual_norm_affine(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    channel_dim: int,
    gate_plus: float,
    plus: float,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The join, its modulated norm, and the norm's statistics."""
    joined, out = (layout.empty_like(x, channel_dim) for _ in range(2))
    stats = _statistics(x, channel_dim, norm)
    operands = Operands(x, y, gate, scale, shift, index)
    _run(Constants(channel_dim, norm, 1, eps, gate_plus, plus), operands, joined, out, stats)
    return joined, out, stats


@torch.library.custom_op("condmod::modulation_backward", mutates_args=())
def modulation_backward(
    d_joined: Tensor | None,
    d_out: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    stats: Tensor | None,
    channel_dim: int,
    gate_plus: float,
    plus: float,
    norm: str,
    groups: int,
    branch_dtype: torch.dtype,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients of x, y, gate, scale and shift that are wanted, in this order."""
    from condmod.functional.kernels.gradients import Features, Upstream, backward
    from condmod.functional.kernels.launch import Call

    operands = Operands(x, y, gate, scale, shift, index)
    like = _like(d_joined, d_out, x)
    dx, dy = _features(like, channel_dim, branch_dtype, wanted)
    if like.numel() == 0:
        leaves = tuple(
            None if leaf is None else leaf.zero_()
            for leaf in _leaves(operands, channel_dim, wanted)
        )
    else:
        constants = Constants(channel_dim, norm, groups, 0.0, gate_plus, plus)
        with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]  # torch's
            leaves = backward(
                Call(constants, operands, like, (d_joined, d_out)),
                Upstream(d_joined, d_out, None if norm == "none" else stats),
                Features(dx, dy),
                (wanted[2], wanted[3], wanted[4]),
            )
    return [gradient for gradient in (dx, dy, *leaves) if gradient is not None]


@gate_residual.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None, channel_dim: int, gate_plus: float
) -> Tensor:
    return layout.empty_like(x, channel_dim)


@norm_affine.register_fake
def _(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    channel_dim: int,
    plus: float,
    norm: str,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return layout.empty_like(x, channel_dim), _statistics(x, channel_dim, norm)


@gate_residual_norm_affine.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    channel_dim: int,
    gate_plus: float,
    plus: float,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    joined, out = (layout.empty_like(x, channel_dim) for _ in range(2))
    return joined, out, _statistics(x, channel_dim, norm)


@modulation_backward.register_fake
def _(
    d_joined: Tensor | None,
    d_out: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    stats: Tensor | None,
    channel_dim: int,
    gate_plus: float,
    plus: float,
    norm: str,
    groups: int,
    branch_dtype: torch.dtype,
    wanted: Sequence[bool],
) -> list[Tensor]:
    operands = Operands(x, y, gate, scale, shift, index)
    like = _like(d_joined, d_out, x)
    made = (
        *_features(like, channel_dim, branch_dtype, wanted),
        *_leaves(operands, channel_dim, wanted),
    )
    return [gradient for gradient in made if gradient is not None]


def _run(
    constants: Constants,
    operands: Operands,
    joined: Tensor | None,
    out: Tensor | None,
    stats: Tensor | None,
) -> None:
    x = operands.x
    if x is None or x.numel() == 0:
        return
    from condmod.functional.kernels.launch import Call, forward

    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # torch's
        normed = stats is not None and constants.norm != "none"
        forward(Call(constants, operands, x), joined, out, stats if normed else None)


def _statistics(x: Tensor, channel_dim: int, norm: str) -> Tensor:
    """Memory for means and reciprocal deviations: of positions, or of channels for norm group."""
    batch, channels = x.shape[0], x.shape[channel_dim]
    shape: tuple[int, ...] = (2, batch, channels)
    if norm == "none":
        shape = (0,)
    elif norm != "group":
        positions = 1
        for size in x.shape[2:] if channel_dim == 1 else x.shape[1:-1]:
            positions *= size
        shape = (2, batch, positions)
    return x.new_empty(shape, dtype=widest(x.dtype))


def _like(d_joined: Tensor | None, d_out: Tensor | None, x: Tensor | None) -> Tensor:
    """A tensor of the features' shape and dtype, in their memory layout if that is known."""
    found = next((part for part in (x, d_out, d_joined) if part is not None), None)
    assert found is not None  # a backward pass has a gradient
    return found


def _features(
    like: Tensor, channel_dim: int, branch_dtype: torch.dtype, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the gradients of x and y."""
    return (
        layout.empty_like(like, channel_dim) if wanted[0] else None,
        layout.empty_like(like, channel_dim, branch_dtype) if wanted[1] else None,
    )


def _leaves(
    operands: Operands, channel_dim: int, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Tensors as the gradients of the leaves are."""

    def made(leaf: Tensor | None) -> Tensor | None:
        mode = layout.mode_of(leaf, operands.index)
        if leaf is None or mode != "aligned":
            return None if leaf is None else leaf.new_empty(leaf.shape)
        return layout.empty_like(leaf, channel_dim)

    leaves = (operands.gate, operands.scale, operands.shift)
    return tuple(
        made(leaf) if is_wanted else None
        for leaf, is_wanted in zip(leaves, wanted[2:], strict=True)
    )
