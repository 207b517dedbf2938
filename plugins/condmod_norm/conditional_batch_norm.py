"""Batch norm with a scale and shift for each class."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import ScaleShift, featurewise_affine, normalisation
from condmod_norm._classes import of_class, reset_table


class ConditionalBatchNormConfig(condmod.ModulatorConfig):
    """Options of `conditional_batch_norm`."""

    classes: Annotated[int, Field(ge=1, le=10_000_000)]
    """K, the number of classes; an id is an integer from 0 to K - 1."""
    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-5
    """Added to the variance."""
    momentum: condmod.Probability = 0.1
    """Share of a new batch in the running statistics."""
    init: Literal["published", "identity"] = "published"
    """γ from U(0, 1) as in score_sde, or y = BN(x) at the start."""


class ConditionalBatchNorm(condmod.Modulator[ConditionalBatchNormConfig, ScaleShift]):
    """Class-conditional BatchNorm: y = γ_k·BN(x) + β_k for a sample of class k.

    BN has no parameters: in training it is over all samples and positions of each channel, in
    evaluation by running statistics. The table (K, 2C) holds rows [γ, β].

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2, with integer ids k (B,), or (B, *positions)
        for a class per position; a batch to train on has more than one element per channel.

    Init:
        published: γ from U(0, 1), β at 0. identity: γ at 1, β at 0.

    Source:
        yang-song/score_sde_pytorch models/normalization.py (Apache-2.0); Dumoulin et al., A
        Learned Representation for Artistic Style, 2016, arXiv:1610.07629, with BatchNorm.
    """

    name = "conditional_batch_norm"
    Config = ConditionalBatchNormConfig
    kinds = frozenset({"raw"})

    def __init__(self, config: ConditionalBatchNormConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation(
            "batch", site.features, site.channel_dim, eps=config.eps, momentum=config.momentum
        )
        self.table = nn.Parameter(torch.empty(config.classes, 2 * site.features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh, and forget the running statistics."""
        self.norm.reset_parameters()
        reset_table(self.table, self.config.init)

    def generate(self, condition: condmod.Condition) -> ScaleShift:
        """Scale and shift, each (B, C) or (B, *positions, C)."""
        return of_class(self.where, self.table, condition)

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """γ·BN(x) + β."""
        dim = self.site.channel_dim
        return featurewise_affine(x, modulation, dim, form="raw", norm=self.norm, where=self.where)
