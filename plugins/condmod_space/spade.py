"""SPADE, spatially-adaptive normalisation."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import condmod
from condmod.functional import ScaleShift, featurewise_affine, normalisation
from condmod_space._resize import resized

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_EPS = 1e-5  # of every norm in the official code
_GAIN = 0.02  # of the official code, for all layers of its networks


class Map(NamedTuple):
    """A map as it came, (B, *sides, D): what is read from it depends on the features' sides."""

    map: Tensor


class SpadeConfig(condmod.ModulatorConfig):
    """Options of `spade`."""

    norm: Literal["batch", "instance", "layer", "group", "none"] = "batch"
    """Batch as published, another norm without parameters, or none, for features normed before."""
    groups: Annotated[int, Field(ge=1, le=65536)] = 32
    """Groups of channels for norm='group'; must divide the features."""
    hidden: condmod.Width = 128
    """Channels between the map and the scale and shift."""
    kernel: Annotated[int, Field(ge=1, le=31)] = 3
    """Side of the convolutions' kernels; odd."""
    spatial_dims: Annotated[int, Field(ge=1, le=3)] = 2
    """How many sides features and map have: 1 for sequences, 2 for images, 3 for volumes."""
    init: Literal["published", "identity"] = "published"
    """Xavier of gain 0.02 as in the official code, or y = norm(x) at the start."""

    @model_validator(mode="after")
    def _kernel_is_centred(self) -> Self:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} has no centre; choose an odd one")
        return self


class Spade(condmod.Modulator[SpadeConfig, Map]):
    """SPADE: y = (1 + γ)·norm(x) + β, where γ and β are maps that convolutions make of a map.

    The map is resized to the sides of x by the nearest of its positions; h = relu(conv(map)),
    γ = conv(h), β = conv(h), each with a bias and zeros beyond the border. The norm has no
    parameters: batch over samples and positions (by running statistics in evaluation), instance
    over the positions of a channel, group over those of a group of channels, layer over the
    channels of a position.

    Shapes:
        x (B, *sides, C) or (B, C, *sides) with `spatial_dims` sides; the condition is a map
        (B, *sides, D) or (B, D, *sides) of any resolution. A batch to train on has more than one
        element per channel.

    Init:
        published: Xavier normal of gain 0.02, biases 0, which the official code gives every
        layer, so y is near norm(x). identity: the convolutions of γ and β at 0.

    Source:
        Park et al., Semantic Image Synthesis with Spatially-Adaptive Normalization, 2019,
        arXiv:1903.07291; from the formula, without the spectral norm of the layers around it.
        Group norm as in Wang et al., Semantic Image Synthesis via Diffusion Models, 2022,
        arXiv:2207.00050.
    """

    name = "spade"
    Config = SpadeConfig
    kinds = frozenset({"map"})
    site_params = True

    def __init__(self, config: SpadeConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = None
        if config.norm != "none":
            self.norm = normalisation(
                config.norm,
                site.features,
                site.channel_dim,
                eps=_EPS,
                groups=config.groups,
                where=self.where(),
            )
        self.hidden = _blank(config, self.condition_dim, config.hidden)
        self.scale = _blank(config, config.hidden, site.features)
        self.shift = _blank(config, config.hidden, site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh, and forget running statistics."""
        if self.norm is not None:
            self.norm.reset_parameters()
        for layer in (self.hidden, self.scale, self.shift):
            nn.init.zeros_(layer.bias)
            if self.config.init == "identity" and layer is not self.hidden:
                nn.init.zeros_(layer.weight)
            else:
                nn.init.xavier_normal_(layer.weight, _GAIN)

    @classmethod
    def as_base(cls, config: SpadeConfig) -> Mapping[str, Any]:  # noqa: ARG003
        """No second norm, and γ = β = 0."""
        return {"norm": "none", "init": "identity"}

    def generate(self, condition: condmod.Condition) -> Map:
        """The map itself, channels last."""
        value = self.accept_map(condition)
        if value.ndim != self.config.spatial_dims + 2:
            raise condmod.ShapeError(
                f"{self.where()} takes a map of spatial_dims={self.config.spatial_dims}; got a "
                f"condition {tuple(value.shape)}, which has {value.ndim - 2}"
            )
        return Map(value.movedim(self.site.channel_dim, -1))

    def modulate(self, x: Tensor, modulation: Map) -> Tensor:
        """(1 + γ)·norm(x) + β."""
        dim = self.site.channel_dim
        held = resized(x, modulation.map, dim, self.where)
        h = torch.relu(self.hidden(held.movedim(dim, 1)))
        parts = ScaleShift(*(layer(h).movedim(1, -1) for layer in (self.scale, self.shift)))
        return featurewise_affine(x, parts, dim, norm=self.norm, where=self.where)


def _blank(config: SpadeConfig, channels: int, out_channels: int) -> Any:
    """A convolution that keeps the sides, undrawn."""
    convolution = _CONVOLUTIONS[config.spatial_dims]
    layer = convolution(
        channels, out_channels, config.kernel, padding=config.kernel // 2, device="meta"
    )
    return layer.to_empty(device=torch.get_default_device())
