"""Squeeze-and-excitation."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import (
    Activation,
    Nothing,
    activation,
    blank_linear,
    featurewise_scale,
    reset_linears,
)

_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
}


class SqueezeExciteConfig(condmod.ModulatorConfig):
    """Options of `squeeze_excite`."""

    ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.0625
    """Hidden channels as a part of C: 1/16 as published, 0.25 in MobileNetV3."""
    divisor: Annotated[int, Field(ge=1, le=1024)] = 8
    """The hidden channels are a multiple of it, rounded: 8 as in timm, 1 as published."""
    activation: Activation = "relu"
    """Activation of the hidden channels; silu in EfficientNet."""
    gate: Literal["sigmoid", "hard_sigmoid"] = "sigmoid"
    """What bounds the factors to 0 to 1; hard_sigmoid, clip(v/6 + 1/2), in MobileNetV3."""


class SqueezeExcite(condmod.Modulator[SqueezeExciteConfig, Nothing]):
    """Squeeze-and-excitation: y = x·σ(W₂·relu(W₁·mean(x) + b₁) + b₂).

    The mean is over all positions of a sample, so each channel gets one factor, which the other
    channels set. It reads the features alone and takes no condition.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; with rank 2 the mean is x itself.

    Init:
        torch's default, as timm's module before a model draws it anew: factors around 1/2, so
        the features are about halved (not the identity, which a sigmoid never reaches).

    Source:
        Hu, Shen and Sun, Squeeze-and-Excitation Networks, 2017, arXiv:1709.01507;
        huggingface/pytorch-image-models timm/layers/squeeze_excite.py (Apache-2.0).
    """

    name = "squeeze_excite"
    Config = SqueezeExciteConfig
    kinds = frozenset({"self"})
    site_params = True

    def __init__(self, config: SqueezeExciteConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        step = config.divisor
        hidden = max(step, int(site.features * config.ratio + step / 2) // step * step)
        self.reduce = blank_linear(site.features, hidden)
        self.activation = activation(config.activation)
        self.expand = blank_linear(hidden, site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        reset_linears(self)

    def generate(self, condition: condmod.Condition) -> Nothing:
        """Nothing: everything is read from the features."""
        self.accept_nothing(condition)
        return Nothing()

    def modulate(self, x: Tensor, modulation: Nothing) -> Tensor:  # noqa: ARG002
        """X times the factors that it gives itself."""
        self.check_channels(x)
        dim = self.site.channel_dim
        wide = torch.promote_types(x.dtype, torch.float32)
        positions = x.movedim(dim, -1).unsqueeze(1)  # one at least, where x has none
        mean = positions.mean(tuple(range(1, x.ndim)), dtype=wide)
        excited = self.expand(self.activation(self.reduce(mean.to(self.reduce.weight.dtype))))
        factor = _GATES[self.config.gate](excited.to(wide))
        return featurewise_scale(x, factor, dim, form="raw", where=self.where)
