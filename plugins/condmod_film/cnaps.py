"""FiLM of conditional neural adaptive processes."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

import condmod
from condmod.functional import ScaleShift, blank_linear, featurewise_affine, reset_linears


class CnapsConfig(condmod.ModulatorConfig):
    """Options of `cnaps`."""

    init: Literal["published", "identity"] = "published"
    """ρ and ρ' near 0 as published, or 0, so that y = x at the start."""


class _Trunk(nn.Module):
    """What the sites share: relu(W·z + b)."""

    def __init__(self, condition_dim: int, features: int) -> None:
        super().__init__()
        self.layer = blank_linear(condition_dim, features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.layer.reset_parameters()

    def forward(self, condition: Tensor) -> Tensor:
        """(B, D) to (B, C)."""
        return nn.functional.relu(self.layer(condition))


class Cnaps(condmod.Modulator[CnapsConfig, ScaleShift]):
    """CNAPs' FiLM: y = (1 + ρ·g(u))·x + ρ'·h(u), with u = relu(W·z + b) for all sites at once.

    z is the embedding of a task. g and h are three Linears with skips and ReLU between them; ρ and
    ρ' (C,) are learned, and `penalty` holds them small. The sites of a bank share W and b, so they
    have equal features: one bank for each width of a network.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D), one task per sample.

    Init:
        published: torch's Linear default; ρ from N(0, 0.001²), and ρ' = ρ. identity: ρ and ρ' 0,
        so y = x.

    Source:
        Requeima et al., Fast and Flexible Multi-Task Classification Using Conditional Neural
        Adaptive Processes, 2019, arXiv:1906.07697, cambridge-mlg/cnaps src/adaptation_networks.py
        (MIT).
    """

    name = "cnaps"
    Config = CnapsConfig
    kinds = frozenset({"global"})

    def __init__(self, config: CnapsConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.scale = _three_layers(site.features)
        self.shift = _three_layers(site.features)
        self.scale_rho = nn.Parameter(torch.empty(site.features))
        self.shift_rho = nn.Parameter(torch.empty(site.features))
        self.reset_parameters()

    @classmethod
    def shared(cls, config: CnapsConfig, sites: Sequence[condmod.Site]) -> nn.Module:  # noqa: ARG003
        """The first layer, which every site reads."""
        return _Trunk(*condmod.one_size(cls.name, sites))

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        reset_linears(self.scale)
        reset_linears(self.shift)
        nn.init.normal_(self.scale_rho, std=0.001)
        if self.config.init == "identity":
            nn.init.zeros_(self.scale_rho)
        with torch.no_grad():
            self.shift_rho.copy_(self.scale_rho)

    def penalty(self) -> Tensor:
        """Σρ² + Σρ'², for the loss; the source adds it times 0.001, summed over the sites."""
        return self.scale_rho.square().sum() + self.shift_rho.square().sum()

    def generate(self, condition: condmod.Condition) -> ScaleShift:
        """Scale and shift, each (B, C), from what the shared layer gave."""
        hidden = self.received(condition)
        return ScaleShift(
            self.scale_rho * _with_skips(self.scale, hidden),
            self.shift_rho * _with_skips(self.shift, hidden),
        )

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """(1 + ρ·g)·x + ρ'·h."""
        return featurewise_affine(x, modulation, self.site.channel_dim, where=self.where)


def _three_layers(features: int) -> nn.ModuleList:
    return nn.ModuleList(blank_linear(features, features) for _ in range(3))


def _with_skips(layers: nn.ModuleList, h: Tensor) -> Tensor:
    for number, layer in enumerate(layers):
        h = nn.functional.relu(h) if number else h
        h = h + layer(h)
    return h
