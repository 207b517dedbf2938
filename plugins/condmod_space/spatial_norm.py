"""The spatially conditioned norm of MoVQ."""

from typing import Annotated, Literal, cast

from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import (
    ScaleShift,
    blank_linear,
    featurewise_affine,
    normalisation,
    reset_chunks,
    reset_constant,
)
from condmod_space._resize import resized


class SpatialNormConfig(condmod.ModulatorConfig):
    """Options of `spatial_norm`."""

    groups: Annotated[int, Field(ge=1, le=65536)] = 32
    """Groups of channels; must divide the features."""
    init: Literal["published", "identity"] = "published"
    """Torch's default for convolutions as published, or y = GN(x) at the start."""


class SpatialNorm(condmod.Modulator[SpatialNormConfig, ScaleShift]):
    """SpatialNorm: y = γ(z)·GN(x) + β(z), with γ and β each a 1x1 convolution of a map z.

    γ is raw. GN is GroupNorm with its own learned affine, eps 1e-6. Rows of the one projection
    are [γ, β]; it runs at the resolution of z, and its output is resized to the sides of x by the
    nearest position, which gives what resizing z first does.

    Shapes:
        x (B, *sides, C) or (B, C, *sides) with 1 to 3 sides; the condition is a map (B, *sides, D)
        or (B, D, *sides) of any resolution, with as many sides.

    Init:
        published: torch's default for two convolutions (not the identity), GN's affine at 1 and
        0. identity: weight 0, γ = 1, β = 0, so y = GN(x).

    Source:
        Zheng et al., MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation, 2022,
        arXiv:2209.09002; huggingface/diffusers models/attention_processor.py: SpatialNorm
        (Apache-2.0).
    """

    name = "spatial_norm"
    Config = SpatialNormConfig
    kinds = frozenset({"map"})
    site_params = True
    generate = condmod.generate_linear

    def __init__(self, config: SpatialNormConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation(
            "group",
            site.features,
            site.channel_dim,
            affine="both",
            groups=config.groups,
            where=self.where(),
        )
        self.proj = blank_linear(self.condition_dim, 2 * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.norm.reset_parameters()
        reset_chunks(self.proj, 2)
        if self.config.init == "identity":
            reset_constant(self.proj, (1, 0))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads: the map, channels last."""
        return self.accept_map(condition).movedim(self.site.channel_dim, -1)

    def unpack(self, projected: Tensor) -> ScaleShift:
        """The projection's output as scale and shift, at the map's resolution."""
        return ScaleShift(*projected.chunk(2, dim=-1))

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """γ·GN(x) + β."""
        dim = self.site.channel_dim
        leaves = (resized(x, cast(Tensor, leaf), dim, self.where) for leaf in modulation)
        parts = ScaleShift(*(leaf.movedim(dim, -1) for leaf in leaves))
        return featurewise_affine(x, parts, dim, form="raw", norm=self.norm, where=self.where)
