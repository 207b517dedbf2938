"""How modulation and features fit: views, layouts, dtypes, and the errors where they do not."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from condmod.errors import ConditionError, ShapeError
from condmod.functional.parts import Indexed, Leaf

Pass = Callable[[Tensor], Tensor]
HALVES = frozenset({torch.float16, torch.bfloat16})
SMALL = 1 << 15
"""Elements of features up to which one more op costs more than it saves."""


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
    shape, rank = x.shape, x.ndim
    if leaf.ndim == 2 and rank > 1:
        batch, channels = leaf.shape
        if batch == shape[0] and channels == shape[channel_dim]:
            at = 1 if channel_dim == -1 else 2
            for _ in range(rank - 2):  # a view of anything, and cheaper than a reshape
                leaf = leaf.unsqueeze(at)
            return leaf
    elif leaf.ndim == rank:
        aligned = leaf if channel_dim == -1 else leaf.movedim(-1, 1)
        if aligned.shape == shape:
            return aligned
    raise ShapeError(
        f"modulation {tuple(leaf.shape)} does not fit features {tuple(x.shape)} with channels "
        f"at dim {channel_dim}{_in(where)}; a global one is (B, C), an aligned one has a vector "
        "of C per position of the features, and neither broadcasts"
    )


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """Y, contiguous where x is; a pass that moves dims around gives back the layout it took."""
    return y if y.is_contiguous() or not x.is_contiguous() else y.contiguous()


def widened(x: Tensor, norm: Pass | None, where: Callable[[], str]) -> Tensor:
    """norm(x) in the dtype to compute in, float32 for half precision.

    Raises:
        ShapeError: x is not floating, has other channels than the norm, or too few elements to
            average over.
    """
    check_floating(x, where)
    h = x.float() if x.dtype in HALVES else x
    if norm is None:
        return h
    try:
        return norm(h)
    except ShapeError as error:
        raise placed(error, where) from None


def check_floating(x: Tensor, where: Callable[[], str]) -> None:
    """Check that features are floating.

    Raises:
        ShapeError: they are not.
    """
    if not x.is_floating_point():
        raise ShapeError(f"features are floating; got {x.dtype}{_in(where)}")


def placed(error: ShapeError, where: Callable[[], str]) -> ShapeError:
    """The same error with the place behind it."""
    return ShapeError(f"{error}{_in(where)}")


def widest(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in, float32 for half precision."""
    return torch.float32 if dtype in HALVES else dtype


def is_eager(x: Tensor) -> bool:
    """Whether it is a CPU's memory, and no compiler or transform watches what is done with it."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in {Tensor, Parameter}
        and x.device.type == "cpu"
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with them; a trace must not depend on it."""
    return (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
        and (torch.compiler.is_compiling() or torch._C._get_tracing_state() is None)
    )


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
    if rows.ndim != 3 or index.ndim < 2 or len(rows) != len(index):
        raise ShapeError(
            "an indexed modulation is rows (B, R, C) and an index (B, *positions); got "
            f"{tuple(rows.shape)} and {tuple(index.shape)}{_in(where)}"
        )
    flat, table = index.flatten(1).long(), rows.shape[1]
    if is_eager(rows) and is_eager(index) and flat.numel():
        low, high = (int(bound) for bound in flat.aminmax())
        if low < 0 or high >= table:
            raise ConditionError(
                f"Signal.index chooses among {table} rows, 0 to {table - 1}; got {low} to {high}"
                f"{_in(where)}"
            )
        first = torch.arange(0, table * len(rows), table, device="cpu")
        # A gather is ten times slower; an embedding sums gradients in the dtype of its table.
        summed = rows.float() if rows.dtype in HALVES and is_recorded(rows) else rows
        found = F.embedding(flat + first[:, None], summed.flatten(0, 1)).to(rows.dtype)
    else:
        found = rows.gather(1, flat[..., None].expand(*flat.shape, rows.shape[-1]))
    return found.reshape(*index.shape, rows.shape[-1])


def _in(where: Callable[[], str]) -> str:
    place = where()
    return f" in {place}" if place else ""
