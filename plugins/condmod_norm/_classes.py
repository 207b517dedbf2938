"""What norms with a row for each class share: the table's start, and how ids read it."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

import condmod
from condmod.functional import ScaleShift, fill


def reset_table(table: Tensor, init: Literal["published", "identity"]) -> None:
    """γ from U(0, 1) or at 1, β at 0."""
    scale, shift = torch.zeros(table.shape, dtype=table.dtype, device=table.device).chunk(2, -1)
    scale = torch.rand_like(scale) if init == "published" else scale + 1
    fill(table, torch.cat([scale, shift], -1))


def of_class(where: Callable[[], str], table: Tensor, condition: Any) -> ScaleShift:
    """The rows [γ, β] of class ids (B,) or (B, *positions)."""
    signal = condition if isinstance(condition, condmod.Signal) else condmod.Signal(condition)
    ids = signal.value
    surplus = any(part is not None for part in signal[1:])
    if surplus or not isinstance(ids, Tensor):
        got = "a Signal with one of these" if surplus else type(ids).__name__
        raise condmod.ConditionError(
            f"{where()} takes one tensor of class ids, without mask, presence or index; got {got}"
        )
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise condmod.ConditionError(
            f"{where()} has one row per class: an id is an integer; got {ids.dtype}"
        )
    if not ids.ndim:
        raise condmod.ShapeError(
            f"{where()} takes one class id per sample, (B,), or per position, (B, *positions); "
            "got ()"
        )
    try:
        rows = torch.nn.functional.embedding(ids.long(), table)
    except IndexError:
        low, high = (int(bound) for bound in ids.aminmax())
        raise condmod.ConditionError(
            f"{where()} has the classes 0 to {len(table) - 1}; got {low} to {high}"
        ) from None
    return ScaleShift(*rows.chunk(2, dim=-1))
