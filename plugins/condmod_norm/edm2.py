"""The modulation of EDM2's blocks."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import Scale, featurewise_scale, in_layout_of, widened

_SILU = 0.596  # root mean square of silu(z) for z from N(0, 1)


class EDM2Config(condmod.ModulatorConfig):
    """Options of `edm2`."""

    eps: Annotated[float, Field(ge=0.0, le=0.1)] = 1e-4
    """Added to the root mean square of a row of W."""


class EDM2(condmod.Modulator[EDM2Config, Scale]):
    """EDM2: y = mp_silu(x·(1 + a·Ŵ·c)), with mp_silu(z) = silu(z)/0.596.

    Ŵ is W with every row scaled to the length 1 at each use, so that it keeps magnitudes; a is
    one learned gain. There is no norm, no shift and no bias.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        W from N(0, 1), a at 0: y = mp_silu(x), the pass at scale 1, so there is no option. In
        the first step only the gain gets a gradient.

    Source:
        Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2023,
        arXiv:2312.02696.
    """

    name = "edm2"
    Config = EDM2Config
    kinds = frozenset({"global", "aligned", "rows"})

    def __init__(self, config: EDM2Config, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.weight = nn.Parameter(torch.empty(site.features, self.condition_dim))
        self.gain = nn.Parameter(torch.empty(1))  # FSDP2 shards no scalars
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.gain)

    def generate(self, condition: condmod.Condition) -> Scale:
        """The scale a·Ŵ·c, (B, C) or (B, *positions, C)."""
        scale = self.gain * nn.functional.linear(self.accept(condition), self._unit_rows())
        return condmod.indexed(Scale(scale), condition)

    def modulate(self, x: Tensor, modulation: Scale) -> Tensor:
        """mp_silu(x·(1 + scale))."""
        h = widened(x, None, self.where)
        h = featurewise_scale(h, modulation.scale, self.site.channel_dim, where=self.where)
        return in_layout_of(x, (nn.functional.silu(h) / _SILU).to(x.dtype))

    def _unit_rows(self) -> Tensor:
        """W, every row of length 1 but for eps."""
        wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        unit: Tensor = wide / (length + self.config.eps * math.sqrt(self.condition_dim))
        return unit.to(self.weight.dtype)
