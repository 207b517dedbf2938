"""How often the conditions of a model are dropped together, in training."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from torch import nn

from condmod.config import NullableConfig
from condmod.encoder import Encoder


class Dropping(NamedTuple):
    """What the encoders of a model drop.

    Attributes:
        rates: how often every signal that has a null is dropped, by its encoder's name.
        together: how many of all samples lose all of these signals at once.
        jointly: whether one draw drops all of them.
    """

    rates: dict[str, float]
    together: float
    jointly: bool


def dropping(model: nn.Module) -> Dropping:
    """What a model's encoders drop: each by its own draw, but for a joint `drop` around several.

    Frozen ones, as in a teacher or an average of weights, are not looked at.
    """
    outer = [("", model)] if isinstance(model, Encoder) else _encoders(model, "")
    rates: dict[str, float] = {}
    shares = []
    jointly = []
    for name, encoder in outer:
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            continue
        before = len(rates)
        shares.append(_together(name, encoder, rates))
        if len(rates) > before:
            jointly.append(_joint(encoder) > 0)
    return Dropping(rates, prod(shares), jointly == [True])


def _together(name: str, encoder: Encoder[Any], rates: dict[str, float]) -> float:
    """How often all of an encoder's nullable signals are dropped at once; 1 where it has none."""
    config = encoder.config
    if isinstance(config, NullableConfig):
        if not config.nullable:
            return 1.0
        rates[name] = config.drop
        return config.drop
    joint = _joint(encoder)
    own: dict[str, float] = {}
    inner = prod(_together(path, inside, own) for path, inside in _encoders(encoder, name))
    rates.update({path: joint + (1 - joint) * rate for path, rate in own.items()})
    return joint + (1 - joint) * inner


def _joint(encoder: Encoder[Any]) -> float:
    """The rate at which an encoder of several signals drops all of them by one draw."""
    several = not isinstance(encoder.config, NullableConfig)
    return float(getattr(encoder.config, "drop", 0.0)) if several else 0.0


def _encoders(module: nn.Module, prefix: str) -> list[tuple[str, Encoder[Any]]]:
    """The encoders inside a module that are in no other encoder there, once each."""
    inside: set[int] = set()
    found = []
    for name, inner in module.named_modules():
        if inner is not module and isinstance(inner, Encoder) and id(inner) not in inside:
            inside.update(map(id, inner.modules()))
            found.append((f"{prefix}.{name}".strip("."), inner))
    return found
