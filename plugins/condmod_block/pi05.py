"""The adaptive RMS norm of π0.5's action expert."""

from typing import Literal

from torch import Tensor

import condmod
from condmod.functional import ScaleShiftGate, blank_linear, normalisation, reset_constant
from condmod_block._around import Eps, enter_normed, exit_gated


class Pi05Config(condmod.ModulatorConfig):
    """Options of `pi05`."""

    eps: Eps = 1e-6
    """Added to the mean square."""
    init: Literal["published", "identity"] = "published"
    """Zero as in π0.5 (the branch closed), or the gate at 1 (x + f(RMS(x)) at the start)."""


class Pi05(condmod.SublayerModulator[Pi05Config, ScaleShiftGate]):
    """π0.5's adaRMS: x + gate·f((1 + scale)·RMS(x) + shift), around one sublayer f.

    RMS has no parameters. (scale, shift, gate) = W·c + b, without an activation before W; rows
    of W are [scale, shift, gate].

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; RMS is
        over the channels of each position.

    Init:
        published: weight and bias 0, so y = x; in the first step only the gate gets a gradient.
        identity: weight 0, gate 1: y = x + f(RMS(x)).

    Source:
        Physical Intelligence, π0.5: a Vision-Language-Action Model with Open-World
        Generalization, 2025, arXiv:2504.16054, Physical-Intelligence/openpi
        src/openpi/models/gemma.py (Apache-2.0).
    """

    name = "pi05"
    Config = Pi05Config
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear
    enter = enter_normed
    exit = exit_gated

    def __init__(self, config: Pi05Config, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation("rms", site.features, site.channel_dim, eps=config.eps)
        self.proj = blank_linear(self.condition_dim, 3 * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter as at the start; nothing is random."""
        reset_constant(self.proj, (0, 0, self.config.init == "identity"))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> tuple[ScaleShiftGate]:
        """The projection's output as the one part's modulation."""
        return (ScaleShiftGate(*projected.chunk(3, dim=-1)),)
