# ruff: noqa: ARG001  torch passes every output and its gradient
"""The gradients of the operators, and what they keep until then: inputs and statistics."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from condmod.functional.kernels import layout, ops
from condmod.functional.kernels.ops import Constants, Operands

_X, _Y, _GATE, _SCALE, _SHIFT = range(5)


def _keep(
    ctx: Any,
    constants: Constants,
    operands: Operands,
    stats: Tensor | None,
    wanted: Sequence[bool],
) -> None:
    """Save what the wanted gradients read, and no more."""
    x, y, gate, scale, shift, index = operands
    assert x is not None  # every forward op has features
    normed = constants.norm != "none"
    features = wanted[_SCALE] or (normed and any(wanted[:_SHIFT]))
    indexed = any(
        layout.mode_of(leaf, index) == "rows" for leaf in (gate, scale, shift) if leaf is not None
    )
    ctx.save_for_backward(
        x if features else None,
        y if features or wanted[_GATE] else None,
        gate if features or wanted[_Y] or wanted[_GATE] else None,
        scale if any(wanted[:_SHIFT]) else None,
        shift if wanted[_SHIFT] else None,
        index if indexed else None,
        stats if normed and features else None,
    )
    if stats is not None:
        ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.constants = constants
    ctx.branch_dtype = (x if y is None else y).dtype
    ctx.wanted = tuple(wanted)


def _differentiate(ctx: Any, d_joined: Tensor | None, d_out: Tensor | None) -> list[Tensor | None]:
    """The gradients of x, y, gate, scale and shift."""
    found: list[Tensor | None] = [None] * 5
    x, y, gate, scale, shift, index, stats = ctx.saved_tensors
    constants: Constants = ctx.constants
    wanted = list(ctx.wanted)
    norm = constants.norm
    if d_out is None:
        # What was joined is all that somebody used: x gets its gradient as it is.
        if d_joined is None:
            return found
        found[_X] = d_joined if wanted[_X] else None
        wanted = [False, wanted[_Y], wanted[_GATE], False, False]
        x, scale, shift, stats, norm = None, None, None, None, "none"
    if any(wanted):
        made = ops.modulation_backward(
            d_joined, d_out, x, y, gate, scale, shift, index, stats,
            constants.channel_dim, constants.gate_plus, constants.plus, norm, constants.groups,
            ctx.branch_dtype, wanted,
        )  # fmt: skip
        rest = iter(made)
        for place, is_wanted in enumerate(wanted):
            if is_wanted:
                found[place] = next(rest)
    return found


def _keep_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, gate, index, channel_dim, gate_plus = inputs
    needs = ctx.needs_input_grad
    operands = Operands(x, y, gate, None, None, index)
    constants = Constants(channel_dim, gate_plus=gate_plus)
    _keep(ctx, constants, operands, None, (*needs[:3], False, False))


def _gate_gradients(ctx: Any, d_joined: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_differentiate(ctx, d_joined, None)[:3], *[None] * 3)


def _keep_affine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scale, shift, index, channel_dim, plus, norm, groups, eps = inputs
    needs = ctx.needs_input_grad
    operands = Operands(x, None, None, scale, shift, index)
    constants = Constants(channel_dim, norm, groups, eps, 0.0, plus)
    _keep(ctx, constants, operands, output[1], (needs[0], False, False, *needs[1:3]))


def _affine_gradients(
    ctx: Any, d_out: Tensor | None, d_stats: Tensor | None
) -> tuple[Tensor | None, ...]:
    found = _differentiate(ctx, None, d_out)
    return (found[_X], found[_SCALE], found[_SHIFT], *[None] * 6)


def _keep_both(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    operands = Operands(*inputs[:6])
    channel_dim, gate_plus, plus, norm, eps = inputs[6:]
    constants = Constants(channel_dim, norm, 1, eps, gate_plus, plus)
    _keep(ctx, constants, operands, output[2], ctx.needs_input_grad[:5])


def _both_gradients(
    ctx: Any, d_joined: Tensor | None, d_out: Tensor | None, d_stats: Tensor | None
) -> tuple[Tensor | None, ...]:
    return (*_differentiate(ctx, d_joined, d_out), *[None] * 6)


ops.gate_residual.register_autograd(_gate_gradients, setup_context=_keep_gate)
ops.norm_affine.register_autograd(_affine_gradients, setup_context=_keep_affine)
ops.gate_residual_norm_affine.register_autograd(_both_gradients, setup_context=_keep_both)
