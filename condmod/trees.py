"""Conditions and modulations as trees of tensors: their leaves, and the same tree with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from condmod.errors import ConditionError
from condmod.site import Signal


def leaves(tree: Any) -> Iterator[Tensor]:
    """Every tensor, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif tree is not None:
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from leaves(part)


def filled(tree: Any, tensors: Iterator[Any]) -> Any:
    """The same tree with the next of `tensors` in place of each tensor."""
    if isinstance(tree, Tensor):
        return next(tensors)
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {name: filled(part, tensors) for name, part in tree.items()}
    parts = [filled(part, tensors) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


def named(condition: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a condition by its name, in the order of `leaves`.

    A mapping's are called by their keys, a Signal's value as the Signal itself, what belongs to it
    "label.present", and a tensor that stands alone "condition".

    Raises:
        ConditionError: it holds something else than tensors.
    """
    if isinstance(condition, Tensor):
        yield name or "condition", condition
    elif isinstance(condition, Mapping):
        for key, part in condition.items():
            yield from named(part, f"{name}.{key}" if name else str(key))
    elif isinstance(condition, Signal):
        yield from named(condition.value, name)
        for field, part in zip(Signal._fields[1:], condition[1:], strict=True):
            if part is not None:
                yield from named(part, f"{name or 'condition'}.{field}")
    else:
        raise ConditionError(
            f"a condition is a tensor, a Signal, or a mapping of names to these; got "
            f"{type(condition).__name__}{f' as {name!r}' if name else ''}"
        )
