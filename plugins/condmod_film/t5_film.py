"""FiLM behind T5's norm, of the spectrogram decoder of Multi-instrument Music Synthesis."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import (
    ScaleShift,
    blank_linear,
    featurewise_affine,
    normalisation,
    reset_constant,
)


class T5FilmConfig(condmod.ModulatorConfig):
    """Options of `t5_film`."""

    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-6
    """Added to the mean square."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default as in diffusers, or y = RMS(x) at the start."""


class T5Film(condmod.Modulator[T5FilmConfig, ScaleShift]):
    """T5's FiLM: y = (1 + s)·RMS(x) + t, with (s, t) = W·c.

    RMS is T5's layer norm, RMSNorm with a learned weight. Rows of W are [scale, shift]; it has no
    bias, and the condition is not activated.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; RMS is
        over the channels of each position.

    Init:
        published: torch's Linear default, RMS's weight 1. identity: W = 0.

    Source:
        Hawthorne et al., Multi-instrument Music Synthesis with Spectrogram Diffusion, 2022,
        arXiv:2206.05408, huggingface/diffusers models/transformers/t5_film_transformer.py
        (Apache-2.0).
    """

    name = "t5_film"
    Config = T5FilmConfig
    kinds = frozenset({"global", "aligned", "rows"})
    site_params = True
    generate = condmod.generate_linear

    def __init__(self, config: T5FilmConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation(
            "rms", site.features, site.channel_dim, affine="weight", eps=config.eps
        )
        self.proj = blank_linear(self.condition_dim, 2 * site.features, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.norm.reset_parameters()
        self.proj.reset_parameters()
        if self.config.init == "identity":
            reset_constant(self.proj, (0, 0))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> ScaleShift:
        """The projection's output as scale and shift."""
        return ScaleShift(*projected.chunk(2, dim=-1))

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """(1 + s)·RMS(x) + t."""
        dim = self.site.channel_dim
        return featurewise_affine(x, modulation, dim, norm=self.norm, where=self.where)
