"""What a modulation is made of, and the forms in which scale and gate are read."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

ScaleForm = Literal["raw", "one_plus", "sigmoid", "exp", "one_plus_tanh"]
GateForm = Literal["linear", "one_plus", "tanh", "sigmoid", "sigmoid_one_minus"]
Activation = Literal["none", "relu", "gelu", "silu", "mish"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
}
_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "one_plus": lambda value: value + 1,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "one_plus_tanh": lambda value: value.tanh() + 1,
    "tanh": torch.tanh,
    "sigmoid_one_minus": lambda value: torch.sigmoid(1 - value),
}

PLUS = {"raw": 0.0, "linear": 0.0, "one_plus": 1.0}
"""What is added to a scale or gate, where that is all."""


class Indexed(NamedTuple):
    """A leaf as rows of a table with the row of each position, where many positions share few.

    Attributes:
        rows: (B, R, C).
        index: (B, *positions), integer, from 0 to R - 1.
    """

    rows: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


Leaf: TypeAlias = Tensor | Indexed


class ScaleShift(NamedTuple):
    """What an affine modulation needs at one place: leaves (B, C) or (B, *positions, C)."""

    scale: Leaf
    shift: Leaf


class ScaleShiftGate(NamedTuple):
    """An affine modulation before a sublayer and a gate behind it; leaves as in ScaleShift."""

    scale: Leaf
    shift: Leaf
    gate: Leaf


class Scale(NamedTuple):
    """A multiplicative modulation; the leaf as in ScaleShift."""

    scale: Leaf


class Shift(NamedTuple):
    """An additive modulation; the leaf as in ScaleShift."""

    shift: Leaf


class Gate(NamedTuple):
    """A gate behind a sublayer; the leaf as in ScaleShift."""

    gate: Leaf


class Nothing(NamedTuple):
    """The empty modulation, of what reads the features alone or does nothing."""


def read(form: ScaleForm | GateForm, value: Tensor) -> Tensor:
    """A scale or gate as the factor it stands for: raw and linear are the value itself."""
    return _FORMS[form](value) if form in _FORMS else value


def activation(name: Activation) -> nn.Module:
    """A parameter-free activation by its config name."""
    return _ACTIVATIONS[name]()
