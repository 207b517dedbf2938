"""FiLM of neural audio effects."""

from typing import Literal

from torch import Tensor

import condmod
from condmod.functional import (
    ScaleShift,
    blank_linear,
    featurewise_affine,
    normalisation,
    reset_constant,
)


class AudioFilmConfig(condmod.ModulatorConfig):
    """Options of `audio_film`."""

    batch_norm: bool = True
    """Normalise first; without, it acts on x itself, as effects that run in real time do."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default as published, or y = BN(x) at the start."""


class AudioFilm(condmod.Modulator[AudioFilmConfig, ScaleShift]):
    """FiLM of audio effects: y = γ·BN(x) + β, with (γ, β) = W·c + b.

    BN is batch norm without parameters. γ is raw; rows of W are [γ, β]. The condition is not
    activated.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x. In
        training, BN is over all samples and positions of each channel, which must be more than
        one.

    Init:
        published: torch's Linear default (not the identity). identity: weight 0, γ = 1, β = 0:
        y = BN(x).

    Source:
        Steinmetz and Reiss, Efficient neural networks for real-time modeling of analog dynamic
        range compression, 2021, arXiv:2102.06200, csteinmetz1/micro-tcn microtcn/tcn.py
        (Apache-2.0); without the norm csteinmetz1/steerable-nafx (Apache-2.0).
    """

    name = "audio_film"
    Config = AudioFilmConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: AudioFilmConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = (
            normalisation("batch", site.features, site.channel_dim, eps=1e-5)
            if config.batch_norm
            else None
        )
        self.proj = blank_linear(self.condition_dim, 2 * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh, and forget the statistics."""
        if self.norm is not None:
            self.norm.reset_parameters()
        self.proj.reset_parameters()
        if self.config.init == "identity":
            reset_constant(self.proj, (1, 0))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> ScaleShift:
        """The projection's output as scale and shift."""
        return ScaleShift(*projected.chunk(2, dim=-1))

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """γ·BN(x) + β."""
        dim = self.site.channel_dim
        return featurewise_affine(x, modulation, dim, form="raw", norm=self.norm, where=self.where)
