"""The tanh gate of Flamingo and GLIGEN."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

import condmod
from condmod.functional import Nothing, featurewise_scale, gated_residual, read, same_shape


class TanhGateConfig(condmod.ModulatorConfig):
    """Options of `tanh_gate`."""

    per_channel: bool = False
    """One α for each channel, as `alpha_type='vector'` of IDEFICS, in place of one for all."""
    residual: bool = True
    """Add x as published; False where what is around the sublayer does."""
    gate: Literal["tanh", "one_plus_tanh"] = "tanh"
    """tanh(α) as published, or 1 + tanh(α), which leaves a branch open at 0."""


class TanhGate(condmod.SublayerModulator[TanhGateConfig, Nothing]):
    """Tanh gate: x + tanh(α)·f(x), around one sublayer f, with a learned α.

    It reads the features alone and takes no condition: f does, as a cross-attention to images in
    a language model does. Attached around a sublayer of a model that stays as it is, it is
    (1 + tanh(α))·f(x), which starts as f(x).

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2.

    Init:
        α = 0, so y = x, whatever f is; in the first step α alone gets a gradient. With a gate of
        1 + tanh(α): y = x + f(x).

    Source:
        Alayrac et al., Flamingo: a Visual Language Model for Few-Shot Learning, 2022,
        arXiv:2204.14198; Li et al., GLIGEN: Open-Set Grounded Text-to-Image Generation, 2023,
        arXiv:2301.07093, huggingface/diffusers models/attention.py: GatedSelfAttentionDense
        (Apache-2.0).
    """

    name = "tanh_gate"
    Config = TanhGateConfig
    kinds = frozenset({"self"})
    site_params = True

    def __init__(self, config: TanhGateConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.alpha = nn.Parameter(torch.empty(site.features if config.per_channel else 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set α to 0; nothing is random."""
        nn.init.zeros_(self.alpha)

    @classmethod
    def as_base(cls, config: TanhGateConfig) -> Mapping[str, Any]:  # noqa: ARG003
        """No second residual, and an open branch."""
        return {"residual": False, "gate": "one_plus_tanh"}

    def generate(self, condition: condmod.Condition) -> tuple[Nothing]:
        """Nothing: α belongs to the site."""
        self.accept_nothing(condition)
        return (Nothing(),)

    def enter(
        self,
        x: Tensor,
        modulation: Nothing,  # noqa: ARG002
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """The features as they are."""
        return x

    def exit(
        self,
        x: Tensor,
        y: Tensor,
        modulation: Nothing,  # noqa: ARG002
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """The gated output of the sublayer, joined to x where there is a residual."""
        dim = self.site.channel_dim
        wide = torch.promote_types(x.dtype, torch.float32)
        gate = read(self.config.gate, self.alpha.to(wide)).expand(x.shape[0], self.site.features)
        if self.config.residual:
            return gated_residual(x, y, gate, dim, where=self.where)
        same_shape(x, y, self.where)
        return featurewise_scale(y, gate, dim, form="raw", where=self.where)
