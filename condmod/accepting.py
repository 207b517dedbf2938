"""Whether a condition is a map or a set of tokens of the width that a component takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from condmod.errors import ConditionError, ShapeError
from condmod.site import Signal, Site, is_bool


def accept_map(where: Callable[[], str], site: Site, condition: Any) -> Tensor:
    """A map as it came, (B, D, *sides) or (B, *sides, D) as the site has its channels."""
    signal = condition if isinstance(condition, Signal) else Signal(condition)
    value = signal.value
    surplus = any(part is not None for part in signal[1:])
    if surplus or not (isinstance(value, Tensor) and value.is_floating_point()):
        raise ConditionError(
            f"{where()} takes one floating map, without mask, presence or index; got "
            f"{'a Signal with one of these' if surplus else _kind(value)}"
        )
    inside = "{0}, *sides" if site.channel_dim == 1 else "*sides, {0}"
    if value.ndim < 3 or value.shape[site.channel_dim] != site.condition_dim or not value.numel():
        raise ShapeError(
            f"{where()} takes a map (B, {inside.format(f'condition_dim={site.condition_dim}')}) of "
            f"one position or more; got a condition {tuple(value.shape)}"
        )
    return value


def accept_set(
    where: Callable[[], str], site: Site, condition: Any, *, may_hide_all: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, S, D) and their mask, (B, S), True where a token is real."""
    signal = condition if isinstance(condition, Signal) else Signal(condition)
    value, mask = signal.value, signal.mask
    if signal.present is not None or signal.index is not None:
        surplus = "present" if signal.present is not None else "index"
        raise ConditionError(
            f"{where()} takes tokens and their mask, without `{surplus}`; an absent condition is "
            "one whose mask hides all its tokens, where there are null keys, or what a nullable "
            "encoder gives"
        )
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        raise ConditionError(
            f"{where()} takes embedded tokens as its condition; got {_kind(value)}; token ids go "
            "through an embedding first"
        )
    if value.ndim != 3 or value.shape[-1] != site.condition_dim or not value.shape[1]:
        raise ShapeError(
            f"{where()} takes one token or more, (B, S, condition_dim={site.condition_dim}); got a "
            f"condition {tuple(value.shape)}"
        )
    if mask is not None and not is_bool(mask, value.shape[:2]):
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)[:60]
        raise ConditionError(
            f"{where()}: Signal.mask is bool, one per token, True where it is real; got {got} with "
            f"tokens {tuple(value.shape)}"
        )
    if mask is not None and not may_hide_all and (bare := hidden_samples(mask)):
        raise ConditionError(
            f"{where()}: Signal.mask hides every token of the samples {bare}, tokens "
            f"{tuple(value.shape)}; show one token at least, as a nullable encoder does of an "
            "absent condition, or give the component null keys where it has the option"
        )
    return value, mask


def accept_sets(
    where: Callable[[], str], site: Site, names: Sequence[str], condition: Any
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Several sets of tokens by their names, each as `accept_set` gives it, of one batch."""
    given = set(condition) if isinstance(condition, Mapping) else set()
    if given != set(names):
        missing = [name for name in names if name not in given]
        surplus = sorted(str(name) for name in given if name not in names)
        got = (
            f"missing {missing}, surplus {surplus}"
            if isinstance(condition, Mapping)
            else f"got {type(condition).__name__}"
        )
        raise ConditionError(f"{where()} takes a mapping with the keys {list(names)}; {got}")
    sets = {name: accept_set(partial(_of, where, name), site, condition[name]) for name in names}
    batches = {name: tokens.shape[0] for name, (tokens, _) in sets.items()}
    if any(batch != batches[names[0]] for batch in batches.values()):
        raise ShapeError(
            f"{where()}: the sets of tokens have batches of {batches}; a single sample is not "
            "repeated"
        )
    return sets


def hidden_samples(mask: Tensor) -> list[int]:
    """The samples to which a mask leaves no token; told in eager mode on a CPU alone."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return []
    hidden: list[int] = (~mask.any(1)).nonzero().flatten().tolist()
    return hidden


def _of(where: Callable[[], str], name: str) -> str:
    return f"{where()}, {name!r}"


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
