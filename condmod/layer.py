"""How a type of layer reads and gives features; what a plugin tells attach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Layer(NamedTuple):
    """How modules of one class read and give features.

    Attributes:
        gives: C of the features that come out, of a module of the class.
        reads: C of those that go in; None where they are the same.
        channel_dim: -1 for (B, ..., C), 1 for (B, C, ...), or what tells it of a module.
        argument: the name of the argument that holds the features; "" for the first.
        item: which of several outputs holds the features: its position, in a mapping, too.
        refuses: why a module, or what it reads, cannot be conditioned; "" where it can. It is
            given the module and "input", "output", "around" or "weight".
    """

    gives: Callable[[Any], int]
    reads: Callable[[Any], int] | None = None
    channel_dim: int | Callable[[Any], int] = -1
    argument: str = ""
    item: int = 0
    refuses: Callable[[Any, str], str] | None = None
