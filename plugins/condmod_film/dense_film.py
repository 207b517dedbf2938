"""DenseFiLM of EDGE and Audio2Photoreal."""

from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor, nn

import condmod
from condmod.functional import (
    ScaleForm,
    ScaleShift,
    activation,
    blank_linear,
    featurewise_affine,
    mlp,
    reset_constant,
    reset_linears,
)


class DenseFilmConfig(condmod.ModulatorConfig):
    """Options of `dense_film`."""

    scale: ScaleForm = "one_plus"
    """How s is read: raw s, 1 + s, σ(s), exp(s) or 1 + tanh(s)."""
    residual: bool = False
    """Add the features themselves: x + (1 + s)·x + t."""
    init: Literal["published", "xavier", "identity"] = "published"
    """Torch's Linear default (EDGE), Xavier normal with zero bias, or y = x at the start."""
    hidden: tuple[condmod.Width, ...] = ()
    """Widths of hidden layers of the generator, each behind a Mish."""

    @model_validator(mode="after")
    def _identity_is_reachable(self) -> Self:
        reachable = (
            {"raw", "one_plus"} if self.residual else {"raw", "one_plus", "exp", "one_plus_tanh"}
        )
        if self.init == "identity" and self.scale not in reachable:
            raise ValueError(
                f"init='identity' cannot be reached by scale={self.scale!r}"
                f"{' with residual=True' if self.residual else ''}; "
                f"choose from {', '.join(sorted(reachable))}"
            )
        return self


class DenseFilm(condmod.Modulator[DenseFilmConfig, ScaleShift]):
    """DenseFiLM: (s, t) = W·mish(c) + b; y = (1 + s)·x + t, or x + (1 + s)·x + t as residual.

    Rows of W are [scale, shift].

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        published: torch's Linear default. xavier: Xavier normal, bias 0, as Audio2Photoreal's
        diffusion model. identity: weight 0 and the bias that makes y = x (s = -1 as residual).

    Source:
        Tseng, Castellon and Liu, EDGE: Editable Dance Generation from Music, 2022,
        arXiv:2211.10658, Stanford-TML/EDGE model/model.py (MIT).
    """

    name = "dense_film"
    Config = DenseFilmConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: DenseFilmConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        widths = (self.condition_dim, *config.hidden)
        self.hidden = nn.Sequential(activation("mish"), *mlp(widths, "mish"))
        self.proj = blank_linear(widths[-1], 2 * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        reset_linears(self.hidden)
        self.proj.reset_parameters()
        if self.config.init == "xavier":
            nn.init.xavier_normal_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)
        elif self.config.init == "identity":
            reset_constant(self.proj, (int(self.config.scale == "raw") - self.config.residual, 0))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        prepared: Tensor = self.hidden(self.accept(condition))
        return prepared

    def unpack(self, projected: Tensor) -> ScaleShift:
        """The projection's output as scale and shift."""
        scale, shift = projected.chunk(2, dim=-1)
        return ScaleShift(scale, shift)

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """(1 + s)·x + t, and x once more as residual."""
        return featurewise_affine(
            x,
            modulation,
            self.site.channel_dim,
            form=self.config.scale,
            residual=self.config.residual,
            where=self.where,
        )
