"""FiLM in its textbook form."""

from typing import Literal, Self, cast

from pydantic import model_validator
from torch import Tensor

import condmod
from condmod.functional import (
    Activation,
    ScaleForm,
    ScaleShift,
    blank_linear,
    featurewise_affine,
    mlp,
    reset_chunks,
    reset_constant,
    reset_linears,
)


class FilmConfig(condmod.ModulatorConfig):
    """Options of `film`."""

    scale: ScaleForm = "raw"
    """How γ is read: raw γ, 1 + γ, σ(γ), exp(γ) or 1 + tanh(γ)."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default as in the textbook, or y = x at the start."""
    hidden: tuple[condmod.Width, ...] = ()
    """Widths of hidden layers of the generator, each a Linear and the activation."""
    activation: Activation = "silu"
    """Activation behind each hidden layer."""

    @model_validator(mode="after")
    def _identity_is_reachable(self) -> Self:
        if self.init == "identity" and self.scale == "sigmoid":
            raise ValueError("init='identity' needs a scale of 1, which a sigmoid never reaches")
        return self


class Film(condmod.Modulator[FilmConfig, ScaleShift]):
    """FiLM: y = γ(c)·x + β(c), with γ and β each one Linear of the condition.

    Both come from one Linear(D, 2C), rows [γ, β], drawn as two separate Linears would be, γ
    first: under equal seeds it equals the textbook class of two `nn.Linear`.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        published: torch's Linear default (not the identity). identity: weight 0, γ = 1, β = 0.

    Source:
        Perez et al., FiLM: Visual Reasoning with a General Conditioning Layer, 2017,
        arXiv:1709.07871; the plain form that is common in practice.
    """

    name = "film"
    Config = FilmConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: FilmConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        widths = (self.condition_dim, *config.hidden)
        self.hidden = mlp(widths, config.activation)
        self.proj = blank_linear(widths[-1], 2 * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        reset_linears(self.hidden)
        reset_chunks(self.proj, 2)
        if self.config.init == "identity":
            reset_constant(self.proj, (self.config.scale == "raw", 0))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        accepted, hidden = self.accept(condition), self.hidden
        return cast(Tensor, hidden(accepted)) if len(hidden) else accepted

    def unpack(self, projected: Tensor) -> ScaleShift:
        """The projection's output as scale and shift."""
        scale, shift = projected.chunk(2, dim=-1)
        return ScaleShift(scale, shift)

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """γ·x + β."""
        return featurewise_affine(
            x,
            modulation,
            self.site.channel_dim,
            form=self.config.scale,
            where=self.where,
        )
