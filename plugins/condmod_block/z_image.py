"""The modulation of Z-Image's transformer block."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import blank_linear
from condmod_block._around import Eps
from condmod_block._two_norms import (
    Part,
    TwoNorms,
    enter_two_norms,
    exit_two_norms,
    parts_of,
)


class ZImageConfig(condmod.ModulatorConfig):
    """Options of `z_image`."""

    parts: Annotated[int, Field(ge=1, le=2)] = 2
    """How many sublayers one projection serves: attention and feed-forward, or one alone."""
    eps: Eps = 1e-5
    """Added to the mean square."""


class ZImage(condmod.SublayerModulator[ZImageConfig, Part]):
    """Z-Image: x + tanh(gate)·RMS(f((1 + scale)·RMS(x))), around each of `parts` sublayers f.

    Every RMS norm has a weight of its own. One projection W·c + b, without an activation before
    it, gives all parts, rows [scale, gate] for each part in turn.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x, where
        Z-Image has D = min(C, 256), or rows, for noisy and clean tokens side by side; the norms
        are over the channels of each position.

    Init:
        torch's Linear default, every norm's weight 1. A gate of 1 is out of a tanh's reach.

    Source:
        Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion
        Transformer, 2025, arXiv:2511.22699, Tongyi-MAI/Z-Image src/zimage/transformer.py;
        huggingface/diffusers models/transformers/transformer_z_image.py (both Apache-2.0).
    """

    name = "z_image"
    Config = ZImageConfig
    kinds = frozenset({"global", "aligned", "rows"})
    site_params = True
    generate = condmod.generate_linear
    enter = enter_two_norms
    exit = exit_two_norms

    def __init__(self, config: ZImageConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.parts = config.parts
        self.norms = TwoNorms(config.parts, site, config.eps)
        self.proj = blank_linear(self.condition_dim, 2 * config.parts * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.norms.reset_parameters()
        self.proj.reset_parameters()

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> tuple[Part, ...]:
        """The projection's output as one modulation for each part."""
        return parts_of(projected, self.parts)
