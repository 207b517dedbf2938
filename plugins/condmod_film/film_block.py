"""FiLM's residual block."""

from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor, nn

import condmod
from condmod.functional import (
    ScaleForm,
    ScaleShift,
    blank_linear,
    featurewise_affine,
    in_layout_of,
    normalisation,
    reset_constant,
    same_shape,
    widened,
)


class FilmBlockConfig(condmod.ModulatorConfig):
    """Options of `film_block`."""

    scale: ScaleForm = "one_plus"
    """How γ is read: 1 + γ as published, raw γ, σ(γ), exp(γ) or 1 + tanh(γ)."""
    init: Literal["published", "identity"] = "published"
    """Kaiming uniform as published, or y = x + relu(BN(f(x))) at the start."""

    @model_validator(mode="after")
    def _identity_is_reachable(self) -> Self:
        if self.init == "identity" and self.scale == "sigmoid":
            raise ValueError("init='identity' needs a scale of 1, which a sigmoid never reaches")
        return self


class FilmBlock(condmod.SublayerModulator[FilmBlockConfig, ScaleShift]):
    """FiLM's residual block: x + relu((1 + γ)·BN(f(x)) + β), with (γ, β) = W·c + b.

    f is a convolution, which reads x as it is. BN is batch norm without parameters. Rows of W
    are [γ, β].

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x. In
        training, BN is over all samples and positions of each channel, which must be more than
        one.

    Init:
        published: weight Kaiming uniform, bias torch's Linear default (not the identity).
        identity: weight 0, a scale of 1, β = 0: y = x + relu(BN(f(x))).

    Source:
        Perez et al., FiLM: Visual Reasoning with a General Conditioning Layer, 2017,
        arXiv:1709.07871; the options of ethanjperez/film vr/models/film_gen.py.
    """

    name = "film_block"
    Config = FilmBlockConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: FilmBlockConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation("batch", site.features, site.channel_dim, eps=1e-5)
        self.proj = blank_linear(self.condition_dim, 2 * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh, and forget the statistics."""
        self.norm.reset_parameters()
        self.proj.reset_parameters()
        nn.init.kaiming_uniform_(self.proj.weight)
        if self.config.init == "identity":
            reset_constant(self.proj, (self.config.scale == "raw", 0))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> tuple[ScaleShift, ...]:
        """The projection's output as the modulation of the one part."""
        return (ScaleShift(*projected.chunk(2, dim=-1)),)

    def enter(
        self,
        x: Tensor,
        modulation: ScaleShift,  # noqa: ARG002
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """X itself."""
        self.check_channels(x)
        return x

    def exit(
        self,
        x: Tensor,
        y: Tensor,
        modulation: ScaleShift,
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """X plus relu((1 + γ)·BN(y) + β), in float32 for half precision and rounded once."""
        same_shape(x, y, self.where)
        branch = featurewise_affine(
            widened(y, None, self.where),
            modulation,
            self.site.channel_dim,
            form=self.config.scale,
            norm=self.norm,
            where=self.where,
        )
        return in_layout_of(x, (widened(x, None, self.where) + branch.relu()).to(x.dtype))
