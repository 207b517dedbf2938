"""No conditioning at all."""

from torch import Tensor

import condmod
from condmod.functional import Nothing


class NoneConfig(condmod.ModulatorConfig):
    """`none` has no options."""


class Unconditioned(condmod.Modulator[NoneConfig, Nothing]):
    """No conditioning: y = x. The condition is checked and has no effect.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        no parameters.

    Source:
        the zero of any comparison: what the network does by itself.
    """

    name = "none"
    Config = NoneConfig
    kinds = frozenset({"global", "aligned"})

    def reset_parameters(self) -> None:
        """There is nothing to draw."""

    def generate(self, condition: condmod.Condition) -> Nothing:
        """Nothing, after the condition's check."""
        self.accept(condition)
        return Nothing()

    def modulate(self, x: Tensor, modulation: Nothing) -> Tensor:  # noqa: ARG002
        """The features as they are."""
        return x
