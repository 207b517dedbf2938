"""The modulation of Lumina's transformer block."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import blank_linear, reset_constant
from condmod_block._around import Eps, prepare_silu
from condmod_block._two_norms import (
    Part,
    TwoNorms,
    enter_two_norms,
    exit_two_norms,
    parts_of,
)


class LuminaConfig(condmod.ModulatorConfig):
    """Options of `lumina`."""

    parts: Annotated[int, Field(ge=1, le=2)] = 2
    """How many sublayers one projection serves: attention and feed-forward, or one alone."""
    eps: Eps = 1e-5
    """Added to the mean square."""


class Lumina(condmod.SublayerModulator[LuminaConfig, Part]):
    """Lumina: x + tanh(gate)·RMS(f((1 + scale)·RMS(x))), around each of `parts` sublayers f.

    Every RMS norm has a weight of its own. One projection W·silu(c) + b gives all parts, rows
    [scale, gate] for each part in turn.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x, where
        Lumina has D = min(C, 1024); the norms are over the channels of each position.

    Init:
        weight and bias 0, so every block starts as y = x; in the first step only the gates get
        a gradient. A gate of 1 is out of a tanh's reach.

    Source:
        Zhuo et al., Lumina-Next, 2024, arXiv:2406.18583; Qin et al., Lumina-Image 2.0, 2025,
        arXiv:2503.21758, Alpha-VLLM/Lumina-Image-2.0 models/model.py (Apache-2.0).
    """

    name = "lumina"
    Config = LuminaConfig
    kinds = frozenset({"global", "aligned", "rows"})
    site_params = True
    prepare = prepare_silu
    generate = condmod.generate_linear
    enter = enter_two_norms
    exit = exit_two_norms

    def __init__(self, config: LuminaConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.parts = config.parts
        self.norms = TwoNorms(config.parts, site, config.eps)
        self.proj = blank_linear(self.condition_dim, 2 * config.parts * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter as at the start; nothing is random."""
        self.norms.reset_parameters()
        reset_constant(self.proj, (0,))

    def unpack(self, projected: Tensor) -> tuple[Part, ...]:
        """The projection's output as one modulation for each part."""
        return parts_of(projected, self.parts)
