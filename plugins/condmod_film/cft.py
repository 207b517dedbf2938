"""Controllable feature transformation of CodeFormer."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import (
    ScaleShift,
    blank_linear,
    featurewise_affine,
    in_layout_of,
    reset_linears,
    widened,
)


class CftConfig(condmod.ModulatorConfig):
    """Options of `cft`."""

    strength: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """w, which `set_strength` changes later: 0 leaves the features as they are, 1 acts in full."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default as published, or y = x at the start."""


class Cft(condmod.Modulator[CftConfig, ScaleShift]):
    """Controllable feature transformation: y = x + w·(s(c)·x + t(c)), with a strength w.

    s and t are each Linear, LeakyReLU(0.2), Linear. w is no parameter and in no state dict; it is
    applied in `modulate`, so modulations that were kept follow it too. The published s and t are
    3x3 convolutions, which read neighbours and x as well; these read the condition alone, at each
    position.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 3; condition aligned to x.

    Init:
        published: torch's Linear default (not the identity). identity: the second layers 0, so
        y = x.

    Source:
        Zhou et al., Towards Robust Blind Face Restoration with Codebook Lookup Transformer, 2022,
        arXiv:2206.11253; from the formula.
    """

    name = "cft"
    Config = CftConfig
    kinds = frozenset({"aligned"})
    strength: Tensor

    def __init__(self, config: CftConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.scale = _two_layers(self.condition_dim, site.features)
        self.shift = _two_layers(self.condition_dim, site.features)
        self.register_buffer("strength", torch.empty(()), persistent=False)
        self.register_load_state_dict_post_hook(_keep_strength)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh, and set the strength of the config."""
        for layers in (self.scale, self.shift):
            reset_linears(layers)
            if self.config.init == "identity":
                for parameter in layers[2].parameters():
                    nn.init.zeros_(parameter)
        self.set_strength(self.config.strength)

    def set_strength(self, strength: float) -> None:
        """Set w, in place: a compiled model takes it as it is.

        Args:
            strength: from 0, which gives x bit for bit, to 1.

        Raises:
            ConditionError: below 0 or above 1.
        """
        if not 0 <= strength <= 1:
            raise condmod.ConditionError(
                f"{self.where()}: strength is from 0 (the features themselves) to 1; got {strength}"
            )
        self._told = float(strength)
        self.strength.fill_(self._told)

    def generate(self, condition: condmod.Condition) -> ScaleShift:
        """Scale and shift, each (B, *positions, C)."""
        c = self.accept(condition)
        return ScaleShift(self.scale(c), self.shift(c))

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """X + w·(s·x + t)."""
        h = widened(x, None, self.where)
        dim = self.site.channel_dim
        change = featurewise_affine(h, modulation, dim, form="raw", where=self.where)
        y = torch.addcmul(h, change, self.strength.to(h.dtype))
        return in_layout_of(x, y.to(x.dtype))


def _two_layers(condition_dim: int, features: int) -> nn.Sequential:
    return nn.Sequential(
        blank_linear(condition_dim, features), nn.LeakyReLU(0.2), blank_linear(features, features)
    )


def _keep_strength(module: Any, _: Any) -> None:
    """A state dict has no strength, and the memory that it fills may be new (meta, to_empty)."""
    if module.strength.is_meta:
        device = module.scale[0].weight.device
        module.strength = torch.empty_like(module.strength, device=device)
    module.strength.fill_(module._told)
