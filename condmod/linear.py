"""What modulators whose generator is linear share: the three steps, and rows with their index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from torch import Tensor

from condmod.functional import Indexed
from condmod.functional.projecting import project
from condmod.site import Condition, Signal

ModulationT = TypeVar("ModulationT")
ModulationT_co = TypeVar("ModulationT_co", covariant=True)


class LinearGenerator(Protocol[ModulationT_co]):
    """A modulator that shows the three steps of its generator."""

    @property
    def proj(self) -> Callable[[Tensor], Tensor]:
        """The linear step, which a bank may run for many sites at once."""

    def prepare(self, condition: Condition) -> Tensor:
        """What the projection reads.

        It depends on the condition, the config, and how the condition comes (`condition_dim` and
        `channel_dim` of the site), besides parameters and buffers of the modulator. Where `proj`
        holds all of these, a bank runs it once for all its sites.
        """

    def unpack(self, projected: Tensor) -> ModulationT_co:
        """The projection's output as a modulation."""


def generate_linear(component: LinearGenerator[ModulationT], condition: Condition) -> ModulationT:
    """unpack(proj(prepare(condition))), with the index of rows in every leaf.

    A `Linear` may be read in another layout than by calling it, where that is faster on a CPU;
    the result is the same up to rounding.

    Args:
        component: a modulator with `prepare`, `proj` and `unpack`.
        condition: one of its kinds.
    """
    (projected,) = project(component.prepare(condition), (component.proj,))
    return indexed(component.unpack(projected), condition)


def indexed(modulation: ModulationT, condition: Condition) -> ModulationT:
    """The same modulation; where the condition is rows, each leaf with the condition's index.

    Args:
        modulation: a NamedTuple of leaves, or a tuple of such.
        condition: what it was generated from.
    """
    if not isinstance(condition, Signal) or condition.index is None:
        return modulation
    return cast(ModulationT, _with_index(modulation, condition.index))


def _with_index(tree: Any, index: Tensor) -> Any:
    if isinstance(tree, Tensor):
        return Indexed(tree, index)
    parts = [_with_index(part, index) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
