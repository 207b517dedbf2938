"""CondConv: a convolution whose kernel is mixed from experts."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import condmod
from condmod.functional import blank_linear, fill, in_layout_of, read, widened

_CONVOLUTIONS: Any = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


class ConditionalConvConfig(condmod.ModulatorConfig):
    """Options of `conditional_conv`."""

    experts: Annotated[int, Field(ge=1, le=1024)] = 4
    """How many kernels are mixed."""
    kernel: Annotated[int, Field(ge=1, le=31)] = 3
    """Side of the kernels; odd."""
    spatial_dims: Annotated[int, Field(ge=1, le=3)] = 2
    """How many sides the features have: 1 for sequences, 2 for images, 3 for volumes."""
    init: Literal["published", "identity"] = "published"
    """Every expert as torch draws a convolution, or y = x at the start."""

    @model_validator(mode="after")
    def _kernel_is_centred(self) -> Self:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} has no centre; choose an odd one")
        return self


class Routing(NamedTuple):
    """How much of each expert a sample takes, before the sigmoid, (B, E)."""

    routing: Tensor


class ConditionalConv(condmod.Modulator[ConditionalConvConfig, Routing]):
    """CondConv: y = (Σᵢ rᵢ·Wᵢ) ∗ x, with r = σ(A·c + b): a convolution mixed for each sample.

    The kernels are mixed first, so each sample costs one convolution, whatever the number of
    experts. There are zeros beyond the border and no bias, as there is a norm behind it.

    Shapes:
        x (B, *sides, C) or (B, C, *sides) with `spatial_dims` sides; condition (B, D).

    Init:
        published: every expert and the routing as torch draws a convolution and a Linear.
        identity: y = x, of the first expert alone, whose share is 1/2 for every condition; the
        other kernels are 0, and their shares are drawn.

    Source:
        Yang et al., CondConv: Conditionally Parameterized Convolutions for Efficient Inference,
        2019, arXiv:1904.04971; there the condition is the mean of x over its positions.
    """

    name = "conditional_conv"
    Config = ConditionalConvConfig
    kinds = frozenset({"global"})
    site_params = True
    waivers: ClassVar[Mapping[str, str]] = {
        "precision": "the mixed kernel is rounded to half precision, as the weight of a layer is"
    }
    generate = condmod.generate_linear

    def __init__(self, config: ConditionalConvConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        sides = (config.kernel,) * config.spatial_dims
        shape = (config.experts, site.features, site.features, *sides)
        self.proj = blank_linear(self.condition_dim, config.experts)
        self.weight = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        if self.config.init == "published":
            self.proj.reset_parameters()
            bound = (self.site.features * self.config.kernel**self.config.spatial_dims) ** -0.5
            nn.init.uniform_(self.weight, -bound, bound)
            return
        experts = self.weight
        like: dict[str, Any] = {"device": experts.device, "dtype": experts.dtype}
        routing = nn.Linear(self.condition_dim, len(experts), **like)
        twice = torch.zeros(experts.shape, **like)
        centre = (self.config.kernel // 2,) * self.config.spatial_dims
        with torch.no_grad():
            routing.weight[0].zero_()
            routing.bias[0].zero_()
            twice[0].movedim((0, 1), (-2, -1))[centre].diagonal().fill_(2)
        fill(self.proj.weight, routing.weight)
        fill(self.proj.bias, routing.bias)
        fill(experts, twice)

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> Routing:
        """The projection's output as the routing."""
        return Routing(projected)

    def modulate(self, x: Tensor, modulation: Routing) -> Tensor:
        """x, convolved with each sample's kernel."""
        self.check_channels(x)
        routing, sides = modulation.routing, self.config.spatial_dims
        if x.ndim != sides + 2 or x.shape[0] != routing.shape[0]:
            raise condmod.ShapeError(
                f"{self.where()} takes features with {sides} sides (option spatial_dims) and the "
                f"batch of its routing {tuple(routing.shape)}; got {tuple(x.shape)}"
            )
        share = read("sigmoid", widened(routing, None, self.where))
        mixed = (share @ self.weight.flatten(1).to(share.dtype)).to(x.dtype)
        first = x.movedim(self.site.channel_dim, 1)
        y = _CONVOLUTIONS[
            sides
        ](
            first.reshape(-1).view(1, -1, *first.shape[2:]),  # a group of channels for each sample
            mixed.reshape(-1, *self.weight.shape[2:]),
            padding=self.config.kernel // 2,
            groups=x.shape[0],
        )
        y = y.reshape(first.shape).movedim(1, self.site.channel_dim)
        return in_layout_of(x, y.to(x.dtype))
