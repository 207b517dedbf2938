"""AdaGroupNorm of diffusers."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import (
    Activation,
    ScaleShift,
    activation,
    blank_linear,
    featurewise_affine,
    normalisation,
    reset_constant,
)


class AdaGroupNormDiffusersConfig(condmod.ModulatorConfig):
    """Options of `ada_group_norm_diffusers`."""

    groups: Annotated[int, Field(ge=1, le=65536)] = 32
    """Groups of channels; must divide the features."""
    activation: Activation = "none"
    """What the condition goes through before W."""
    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-5
    """Added to the variance."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default, or y = GN(x) at the start."""


class AdaGroupNormDiffusers(condmod.Modulator[AdaGroupNormDiffusersConfig, ScaleShift]):
    """diffusers' AdaGroupNorm: y = (1 + scale)·GN(x) + shift, with (scale, shift) = W·act(c) + b.

    GN has no parameters; its statistics are over all positions of a sample. Rows of W are
    [scale, shift].

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        published: torch's Linear default. identity: weight and bias 0.

    Source:
        huggingface/diffusers models/normalization.py (Apache-2.0): AdaGroupNorm, which takes
        maps (B, C, H, W) alone; after Dhariwal and Nichol, Diffusion Models Beat GANs on Image
        Synthesis, 2021, arXiv:2105.05233.
    """

    name = "ada_group_norm_diffusers"
    Config = AdaGroupNormDiffusersConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: AdaGroupNormDiffusersConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation(
            "group",
            site.features,
            site.channel_dim,
            groups=config.groups,
            eps=config.eps,
            where=self.where(),
        )
        self.activation = activation(config.activation)
        self.proj = blank_linear(self.condition_dim, 2 * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.proj.reset_parameters()
        if self.config.init == "identity":
            reset_constant(self.proj, (0,))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        prepared: Tensor = self.activation(self.accept(condition))
        return prepared

    def unpack(self, projected: Tensor) -> ScaleShift:
        """The projection's output as scale and shift."""
        return ScaleShift(*projected.chunk(2, dim=-1))

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """(1 + scale)·GN(x) + shift."""
        dim = self.site.channel_dim
        return featurewise_affine(x, modulation, dim, norm=self.norm, where=self.where)
