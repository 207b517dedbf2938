"""The two abstract modulators: of features, and around sublayers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, final

from jaxtyping import Float
from torch import Tensor, nn

from condmod.component import Component, ConfigT, ModulationT
from condmod.errors import ConditionError
from condmod.site import Condition

Sublayer = Callable[[Tensor], Tensor]


class Modulator(Component[ConfigT, ModulationT]):
    """Abstract: features to features of the same shape.

    A concrete class implements `generate` (condition to modulation), `modulate` (features and
    modulation to features) and `reset_parameters`.
    """

    @abstractmethod
    def modulate(self, x: Tensor, modulation: ModulationT) -> Tensor:
        """Apply a modulation to the features; never sees the condition."""

    @final  # type: ignore[misc]  # nn.Module declares forward as an attribute
    def forward(
        self, x: Float[Tensor, "B ..."], condition: Condition = None
    ) -> Float[Tensor, "B ..."]:
        """modulate(x, generate(condition)).

        Args:
            x: features, (B, ..., C) or (B, C, ...) as the site says.
            condition: one of `kinds`; None for the kind `self`.

        Returns:
            The shape, dtype and device of x.

        Raises:
            ShapeError: the shapes of features and condition do not belong together.
            ConditionError: the condition's content is wrong, or the modulator's bank has to
                generate.
        """
        self.match(x, condition)
        return self.modulate(x, self.generate(condition))


class SublayerModulator(Component[ConfigT, tuple[ModulationT, ...]]):
    """Abstract: acts around sublayers, in two halves.

    `generate` returns one modulation for each of `parts` sublayers. `sublayer` may be None in
    `enter` and `exit` unless the class sets `reads_weight`.

    Attributes:
        parts: how many sublayers one `generate` serves.
        reads_weight: whether it needs the sublayer itself, whose weight it reads.
        reads: which features each part enters: those before part reads[i], so (0, 0, 2) has the
            first two parts read the same; empty where each reads what the part before it gave.
    """

    reads_weight: ClassVar[bool] = False
    parts: int = 1
    reads: tuple[int, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "between" not in cls.__dict__ and cls.__dict__.keys() & {"enter", "exit"}:
            cls.between = SublayerModulator.between  # type: ignore[method-assign]  # not the parent's

    @classmethod
    def refuses_layer(cls, layer: nn.Module) -> str:  # noqa: ARG003
        """Why it cannot act around a layer whose weight it reads; "" where it can."""
        return ""

    @abstractmethod
    def enter(self, x: Tensor, modulation: ModulationT, sublayer: Sublayer | None) -> Tensor:
        """What the sublayer reads."""

    @abstractmethod
    def exit(
        self, x: Tensor, y: Tensor, modulation: ModulationT, sublayer: Sublayer | None
    ) -> Tensor:
        """Join the features x and the sublayer's output y: gate, residual, output scale."""

    def between(
        self,
        x: Tensor,
        y: Tensor,
        one: tuple[ModulationT, Sublayer | None],
        other: tuple[ModulationT, Sublayer | None],
    ) -> tuple[Tensor, Tensor]:
        """`exit` of one part and `enter` of the next, which a class may do in one pass.

        Args:
            x: what the first part joins to.
            y: what its sublayer gave.
            one: its modulation and sublayer.
            other: those of the next part.

        Returns:
            The features between them, and what the next sublayer reads.
        """
        joined = self.exit(x, y, *one)
        return joined, self.enter(joined, *other)

    @final  # type: ignore[misc]  # nn.Module declares forward as an attribute
    def forward(
        self, x: Float[Tensor, "B ..."], condition: Condition, *sublayers: Sublayer
    ) -> Float[Tensor, "B ..."]:
        """For each part i: x = exit(x, sublayer_i(enter(x, m_i)), m_i).

        Args:
            x: features, (B, ..., C) or (B, C, ...) as the site says.
            condition: one of `kinds`; None for the kind `self`.
            sublayers: `parts` callables from features to features.

        Returns:
            The shape of what the sublayer gives (of half its channels for a gate that pairs them,
            as WaveNet's), with the dtype and device of x (under autocast the dtype
            of what the sublayer gives, where nothing is added to x).

        Raises:
            ConditionError: another number of sublayers than `parts`.
            ShapeError: the shapes of features and condition do not belong together.
        """
        if len(sublayers) != self.parts:
            raise ConditionError(
                f"{self.where()} serves {self.parts} sublayer(s) at once (option `parts`); "
                f"forward(x, condition, *sublayers) got {len(sublayers)}"
            )
        self.match(x, condition)
        return self.around(x, self.generate(condition), *sublayers)

    @final
    def around(
        self, x: Tensor, modulation: tuple[ModulationT, ...], *sublayers: Sublayer
    ) -> Tensor:
        """What `forward` does after `generate`."""
        stages = [x]
        parts = list(zip(modulation, sublayers, strict=True))
        entered = self.enter(x, *parts[0])
        for part, (one, other) in enumerate(pairwise(parts)):
            y = one[1](entered)
            source = self.reads[part + 1] if self.reads else part + 1
            if source == part + 1:
                joined, entered = self.between(stages[part], y, one, other)
                stages.append(joined)
            else:
                stages.append(self.exit(stages[part], y, *one))
                entered = self.enter(stages[source], *other)
        return self.exit(stages[-1], parts[-1][1](entered), *parts[-1])
