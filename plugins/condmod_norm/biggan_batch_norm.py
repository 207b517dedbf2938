"""Class-conditional batch norm of BigGAN."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import ScaleShift, blank_linear, featurewise_affine, fill, normalisation


class BigGANBatchNormConfig(condmod.ModulatorConfig):
    """Options of `biggan_batch_norm`."""

    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-5
    """Added to the variance; 1e-4 in DeepMind's weights and pytorch-pretrained-biggan."""
    momentum: condmod.Probability = 0.1
    """Share of a new batch in the running statistics."""
    init: Literal["published", "identity"] = "published"
    """Orthogonal as BigGAN-PyTorch's G_init='ortho', or y = BN(x) at the start."""


class BigGANBatchNorm(condmod.Modulator[BigGANBatchNormConfig, ScaleShift]):
    """BigGAN's class-conditional BatchNorm: y = (1 + W_g·c)·BN(x) + W_b·c.

    c is the class's embedding, joined with the noise of this level; W has no bias, rows
    [gain, bias]. BN has no parameters: in training it is over all samples and positions of each
    channel, in evaluation by running statistics.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; a batch
        to train on has more than one element per channel.

    Init:
        published: W_g and W_b each orthogonal. identity: 0.

    Source:
        Brock, Donahue and Simonyan, Large Scale GAN Training for High Fidelity Natural Image
        Synthesis, 2018, arXiv:1809.11096, ajbrock/BigGAN-PyTorch layers.py (MIT), without its
        spectral norm.
    """

    name = "biggan_batch_norm"
    Config = BigGANBatchNormConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: BigGANBatchNormConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation(
            "batch", site.features, site.channel_dim, eps=config.eps, momentum=config.momentum
        )
        self.proj = blank_linear(self.condition_dim, 2 * site.features, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh, and forget the running statistics."""
        self.norm.reset_parameters()
        if self.config.init == "identity":
            nn.init.zeros_(self.proj.weight)
            return
        weight = self.proj.weight
        blank = torch.empty(
            self.site.features,
            self.condition_dim,
            dtype=torch.promote_types(weight.dtype, torch.float32),
            device=weight.device,
        )
        fill(weight, torch.cat([nn.init.orthogonal_(blank.clone()) for _ in range(2)]))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> ScaleShift:
        """The projection's output as scale and shift."""
        return ScaleShift(*projected.chunk(2, dim=-1))

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """(1 + W_g·c)·BN(x) + W_b·c."""
        dim = self.site.channel_dim
        return featurewise_affine(x, modulation, dim, norm=self.norm, where=self.where)
