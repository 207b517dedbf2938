"""The passes over the features: every one that a mechanism makes goes through here.

Shapes: B batch, C features, D condition.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from condmod.errors import ConditionError, ShapeError
from condmod.functional.parts import GateForm, Indexed, Leaf, ScaleForm, read

Pass = Callable[[Tensor], Tensor]


def align(
    x: Tensor, leaf: Leaf, channel_dim: int = -1, *, where: Callable[[], str] = str
) -> Tensor:
    """View a leaf (B, C) or (B, *positions, C) so that it broadcasts against x; no copy.

    An indexed leaf is gathered: a row of its table for each position.

    Args:
        x: features (B, ..., C, ...), with C at `channel_dim`.
        leaf: a part of a modulation, C last.
        channel_dim: 1 or -1.
        where: gives the name of the place for an error; called only then, so that a compiled
            graph does not depend on it.

    Raises:
        ShapeError: the leaf is neither global nor aligned to x; nothing broadcasts by chance.
        ConditionError: an index is out of its table's range.
    """
    if isinstance(leaf, Indexed):
        leaf = _gathered(leaf, where)
    if leaf.ndim == 2 and x.ndim > 1:
        expected = (x.shape[0], x.shape[channel_dim])
        if tuple(leaf.shape) == expected:
            middle = [1] * (x.ndim - 2)
            if channel_dim == 1:
                return leaf.reshape(*expected, *middle)
            return leaf.reshape(expected[0], *middle, expected[1])
    elif leaf.ndim == x.ndim:
        aligned = leaf if channel_dim == -1 else leaf.movedim(-1, 1)
        if aligned.shape == x.shape:
            return aligned
    raise ShapeError(
        f"modulation {tuple(leaf.shape)} does not fit features {tuple(x.shape)} with channels "
        f"at dim {channel_dim}{_in(where)}; a global one is (B, C), an aligned one has a vector "
        "of C per position of the features, and neither broadcasts"
    )


def featurewise_affine(
    x: Float[Tensor, "B ..."],
    modulation: tuple[Leaf, Leaf],
    channel_dim: int = -1,
    *,
    form: ScaleForm = "one_plus",
    residual: bool = False,
    norm: Pass | None = None,
    where: Callable[[], str] = str,
) -> Float[Tensor, "B ..."]:
    """y = m(scale)·norm(x) + shift, by default (1 + scale)·x + shift.

    Args:
        x: features (B, ..., C, ...), any rank from 2, with C at `channel_dim`.
        modulation: (scale, shift), each (B, C), (B, *positions, C) or Indexed.
        channel_dim: 1 or -1.
        form: m; raw is scale, one_plus 1 + scale, sigmoid σ(scale), exp exp(scale),
            one_plus_tanh 1 + tanh(scale).
        residual: add x, as in x + (1 + scale)·x + shift.
        norm: what x goes through first, in the wide dtype, as a module of `normalisation` does.
        where: gives the name of the place for an error.

    Returns:
        The shape, dtype and device of x; norm, m and the sum are in float32 for half precision,
        and rounded once.

    Raises:
        ShapeError: a leaf is neither global nor aligned to x; x is not floating.
    """
    h = widened(x, norm, where)
    scale, shift = (align(x, leaf, channel_dim, where=where).to(h.dtype) for leaf in modulation)
    factor = read(form, scale)
    y = torch.addcmul(shift, h, factor + 1 if residual else factor)
    return in_layout_of(x, y.to(x.dtype))


def featurewise_scale(
    x: Float[Tensor, "B ..."],
    scale: Leaf,
    channel_dim: int = -1,
    *,
    form: ScaleForm = "one_plus",
    norm: Pass | None = None,
    where: Callable[[], str] = str,
) -> Float[Tensor, "B ..."]:
    """y = m(scale)·norm(x), by default (1 + scale)·x; arguments as in `featurewise_affine`."""
    h = widened(x, norm, where)
    factor = read(form, align(x, scale, channel_dim, where=where).to(h.dtype))
    return in_layout_of(x, (h * factor).to(x.dtype))


def add_shift(
    x: Float[Tensor, "B ..."],
    shift: Leaf,
    channel_dim: int = -1,
    *,
    norm: Pass | None = None,
    where: Callable[[], str] = str,
) -> Float[Tensor, "B ..."]:
    """y = norm(x) + shift; arguments as in `featurewise_affine`."""
    h = widened(x, norm, where)
    y = h + align(x, shift, channel_dim, where=where).to(h.dtype)
    return in_layout_of(x, y.to(x.dtype))


def gated_residual(
    x: Float[Tensor, "B ..."],
    y: Float[Tensor, "B ..."],
    gate: Leaf,
    channel_dim: int = -1,
    *,
    form: GateForm = "linear",
    norm: Pass | None = None,
    where: Callable[[], str] = str,
) -> Float[Tensor, "B ..."]:
    """x + g(gate)·norm(y), by default x + gate·y.

    Args:
        x: features (B, ..., C, ...), with C at `channel_dim`.
        y: what a sublayer made of them, of the same shape.
        gate: (B, C), (B, *positions, C) or Indexed.
        channel_dim: 1 or -1.
        form: g; linear is gate, one_plus 1 + gate, tanh tanh(gate), sigmoid σ(gate),
            sigmoid_one_minus σ(1 - gate).
        norm: what y goes through first, in the wide dtype.
        where: gives the name of the place for an error.

    Returns:
        The shape, dtype and device of x; half precision is computed in float32.

    Raises:
        ShapeError: y has another shape than x, the gate fits neither, or x is not floating.
    """
    same_shape(x, y, where)
    h = widened(x, None, where)
    factor = read(form, align(x, gate, channel_dim, where=where).to(h.dtype))
    branch = widened(y, norm, where).to(h.dtype)
    return in_layout_of(x, torch.addcmul(h, branch, factor).to(x.dtype))


def layer_norm(x: Tensor, channel_dim: int = -1, eps: float = 1e-6) -> Tensor:
    """Parameter-free LayerNorm over the channels of each position; shape and dtype of x."""
    features = (x.shape[channel_dim],)
    if channel_dim == -1:
        return F.layer_norm(x, features, eps=eps).to(x.dtype)
    normed = F.layer_norm(x.movedim(1, -1), features, eps=eps).movedim(-1, 1)
    return in_layout_of(x, normed.to(x.dtype))


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """Y, contiguous where x is; a pass that moves dims around gives back the layout it took."""
    return y.contiguous() if x.is_contiguous() else y


def widened(x: Tensor, norm: Pass | None, where: Callable[[], str]) -> Tensor:
    """norm(x) in the dtype to compute in, float32 for half precision.

    Raises:
        ShapeError: x is not floating, has other channels than the norm, or too few elements to
            average over.
    """
    if not x.is_floating_point():
        raise ShapeError(f"features are floating; got {x.dtype}{_in(where)}")
    h = x.float() if x.dtype in {torch.float16, torch.bfloat16} else x
    if norm is None:
        return h
    try:
        return norm(h)
    except ShapeError as error:
        raise ShapeError(f"{error}{_in(where)}") from None


def unhalved(x: Tensor) -> AbstractContextManager[Any]:
    """A context where autocast does not halve the precision, for a recurrence or a sum of squares.

    Args:
        x: on whose device; one that knows no autocast, as meta, is fine.
    """
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def same_shape(x: Tensor, y: Tensor, where: Callable[[], str]) -> None:
    """Check that a residual can join features and a sublayer's output.

    Raises:
        ShapeError: they have different shapes, or the sublayer gave no tensor.
    """
    if not isinstance(y, Tensor):
        raise ShapeError(
            f"the sublayer gave a {type(y).__name__}{_in(where)}; it gives back one tensor, as "
            "lambda h: attention(h, h, h)[0] does"
        )
    if y.shape != x.shape:
        raise ShapeError(
            f"the sublayer turned features {tuple(x.shape)} into {tuple(y.shape)}"
            f"{_in(where)}; a residual needs equal shapes"
        )


def _gathered(leaf: Indexed, where: Callable[[], str]) -> Tensor:
    """The row of each position, (B, *positions, C)."""
    rows, index = leaf
    if index.is_floating_point():
        raise ConditionError(
            f"the index of rows is integer; got {index.dtype}{_in(where)}; arithmetic on a "
            "modulation is for its rows alone"
        )
    flat = index.flatten(1).long()
    try:
        found = rows.gather(1, flat[..., None].expand(*flat.shape, rows.shape[-1]))
    except (IndexError, RuntimeError):
        low, high = (int(bound) for bound in flat.aminmax())
        if low >= 0 and high < rows.shape[1]:
            raise  # it is not the index
        raise ConditionError(
            f"Signal.index chooses among {rows.shape[1]} rows, 0 to {rows.shape[1] - 1}; "
            f"got {low} to {high}{_in(where)}"
        ) from None
    return found.reshape(*index.shape, rows.shape[-1])


def _in(where: Callable[[], str]) -> str:
    place = where()
    return f" in {place}" if place else ""
