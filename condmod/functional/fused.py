"""The passes as fused kernels: what the kernels serve, and how a pass looks to them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from condmod.errors import BackendError
from condmod.functional import kernels
from condmod.functional.eager import Affine
from condmod.functional.layout import align, widest
from condmod.functional.norms import Norm
from condmod.functional.parts import PLUS, Indexed, Leaf, read


class Operands(NamedTuple):
    """What a kernel reads beside the features."""

    scale: Tensor | None
    shift: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    plus: float


def affine(x: Tensor, by: Affine) -> Tensor | None:
    """m(scale)·norm(x) + shift by one kernel, or nothing where none serves it."""
    by.check(x)
    found = _operands(x, by)
    if found is None:
        return None
    norm = by.norm if isinstance(by.norm, Norm) else None
    return kernels.norm_affine(
        x,
        found.scale,
        found.shift,
        channel_dim=by.channel_dim,
        index=found.index,
        plus=found.plus,
        norm=None if norm is None else norm.kernel,
        groups=norm.groups if norm else 1,
        eps=norm.eps if norm else 0.0,
    )


def gate(x: Tensor, y: Tensor, by: Affine) -> Tensor | None:
    """X + g(gate)·y by one kernel, or nothing where none serves it."""
    found = None if by.norm is not None else _operands(x, by)
    if found is None or found.scale is None:
        return None
    return kernels.gate_residual(
        x, y, found.scale, channel_dim=by.channel_dim, index=found.index, plus=found.plus
    )


def gate_affine(x: Tensor, y: Tensor, by: Affine, then: Affine) -> tuple[Tensor, Tensor] | None:
    """A gate and the affine behind it by one kernel, or nothing where none serves them."""
    norm = then.norm if isinstance(then.norm, Norm) else None
    kernel = None if norm is None else norm.kernel
    if by.norm is not None or kernel == "group":
        return None
    then.check(x)
    first, second = _operands(x, by), _operands(x, then)
    if first is None or second is None or first.scale is None or first.index is not second.index:
        return None
    return kernels.gate_residual_norm_affine(
        x,
        y,
        first.scale,
        second.scale,
        second.shift,
        channel_dim=by.channel_dim,
        index=first.index,
        gate_plus=first.plus,
        plus=second.plus,
        norm=kernel,
        eps=norm.eps if norm else 0.0,
    )


def check_here(device: torch.device) -> None:
    """Check that kernels run on a device.

    Raises:
        BackendError: they do not; says why.
    """
    if why := kernels.unavailable(device):
        raise BackendError(f"the backend triton cannot run: {why}; or choose the backend auto")


def _operands(x: Tensor, by: Affine) -> Operands | None:
    """What a kernel reads, with the norm's own affine in it, or nothing where it cannot be."""
    norm, dim, where = by.norm, by.channel_dim, by.where
    if norm is not None and not (type(norm) is Norm and norm.is_bare()):
        return None
    scale, index = _leaf(x, by.scale, dim, where)
    shift, other = _leaf(x, by.shift, dim, where)
    if by.scale is None:
        index = other
    elif by.shift is not None and other is not index:
        return None
    wide = widest(x.dtype)
    plus = PLUS.get(by.form, 0.0) + by.residual
    if scale is not None and by.form not in PLUS:
        scale = read(by.form, scale.to(wide))
    weight, bias = norm.own(wide) if isinstance(norm, Norm) else (None, None)
    if weight is None:
        return Operands(scale, shift, index, plus)
    if scale is None or (index is None and scale.ndim != 2):
        return None
    factor = scale.to(wide) + plus
    if bias is not None:
        shift = bias * factor if shift is None else torch.addcmul(shift.to(wide), bias, factor)
    return Operands(weight * factor, shift, index, 0.0)


def _leaf(
    x: Tensor, leaf: Leaf | None, channel_dim: int, where: Callable[[], str]
) -> tuple[Tensor | None, Tensor | None]:
    """A leaf and its index; an aligned one with C where x has it."""
    if leaf is None:
        return None, None
    if isinstance(leaf, Indexed):
        rows, index = leaf
        places = x.movedim(channel_dim, -1).shape[:-1]
        table = rows.ndim == 3 and (rows.shape[0], rows.shape[2]) == (len(x), x.shape[channel_dim])
        if table and index.shape == places and not index.is_floating_point():
            return rows, index
    view = align(x, leaf, channel_dim, where=where)
    return (leaf if isinstance(leaf, Tensor) and leaf.ndim == 2 else view), None
