"""Instance norm with a scale and shift for each class or style."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import ScaleShift, featurewise_affine, normalisation
from condmod_norm._classes import of_class, reset_table


class ConditionalInstanceNormConfig(condmod.ModulatorConfig):
    """Options of `conditional_instance_norm`."""

    classes: Annotated[int, Field(ge=1, le=10_000_000)]
    """K, the number of classes; an id is an integer from 0 to K - 1."""
    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-5
    """Added to the variance."""
    init: Literal["published", "identity"] = "published"
    """γ from U(0, 1) as in score_sde, or y = IN(x) at the start, as for artistic styles."""


class ConditionalInstanceNorm(condmod.Modulator[ConditionalInstanceNormConfig, ScaleShift]):
    """Conditional instance normalisation: y = γ_k·IN(x) + β_k for a sample of class or style k.

    IN has no parameters: it is over all positions of each channel of a sample. The table
    (K, 2C) holds rows [γ, β].

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 3, of more than one position, with integer
        ids k (B,), or (B, *positions) for a class per position.

    Init:
        published: γ from U(0, 1), β at 0. identity: γ at 1, β at 0, the start in the paper's
        own code.

    Source:
        Dumoulin et al., A Learned Representation for Artistic Style, 2016, arXiv:1610.07629;
        yang-song/score_sde_pytorch models/normalization.py (Apache-2.0).
    """

    name = "conditional_instance_norm"
    Config = ConditionalInstanceNormConfig
    kinds = frozenset({"raw"})

    def __init__(self, config: ConditionalInstanceNormConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation("instance", site.features, site.channel_dim, eps=config.eps)
        self.table = nn.Parameter(torch.empty(config.classes, 2 * site.features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        reset_table(self.table, self.config.init)

    def generate(self, condition: condmod.Condition) -> ScaleShift:
        """Scale and shift, each (B, C) or (B, *positions, C)."""
        return of_class(self.where, self.table, condition)

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """γ·IN(x) + β."""
        dim = self.site.channel_dim
        return featurewise_affine(x, modulation, dim, form="raw", norm=self.norm, where=self.where)
