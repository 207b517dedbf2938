"""A gate for features: a modulator of ACME's own."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import align, blank_linear


class GateConfig(condmod.ModulatorConfig):
    """Options of `acme.gate`."""

    start: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """How far every gate is open at the start."""


class Open(NamedTuple):
    """How far each channel is open, before σ: (B, C) or (B, *positions, C)."""

    gate: Tensor


class Gate(condmod.Modulator[GateConfig, Open]):
    """Gate: y = σ(W·c + b)·x.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        published: torch's Linear default for W, and b = log(start / (1 - start)).

    Source:
        this tutorial.
    """

    name = "acme.gate"
    Config = GateConfig
    kinds: ClassVar[frozenset[Any]] = frozenset({"global", "aligned"})

    def __init__(self, config: GateConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.proj = blank_linear(self.condition_dim, site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.proj.reset_parameters()
        start = self.config.start
        nn.init.constant_(self.proj.bias, math.log(start / (1 - start)))

    def generate(self, condition: condmod.Condition) -> Open:
        """W·c + b, from the condition alone."""
        return Open(self.proj(self.accept(condition)))

    def modulate(self, x: Tensor, modulation: Open) -> Tensor:
        """Gate times features; in float32 at least, for bfloat16 loses small changes of σ."""
        gate = align(x, modulation.gate, self.site.channel_dim, where=self.where)
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) * gate.to(wide).sigmoid()).to(x.dtype)


@condmod.hookimpl
def condmod_modulators() -> Sequence[type[condmod.Modulator[Any, Any]]]:
    """What this plugin brings."""
    return [Gate]
