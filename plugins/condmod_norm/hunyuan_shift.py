"""The shifted layer norm of Hunyuan-DiT."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import Shift, add_shift, blank_linear, normalisation, reset_constant


class HunyuanShiftConfig(condmod.ModulatorConfig):
    """Options of `hunyuan_shift`."""

    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-6
    """Added to the variance."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default, or y = LN(x) at the start."""


class HunyuanShift(condmod.Modulator[HunyuanShiftConfig, Shift]):
    """Hunyuan-DiT's shift: y = LN(x) + shift, with shift = W·silu(c) + b.

    LN has its own learned weight and bias.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x; LN is
        over the channels of each position.

    Init:
        published: torch's Linear default, LN's affine at 1 and 0. identity: weight and bias 0.

    Source:
        Li et al., Hunyuan-DiT, 2024, arXiv:2405.08748; huggingface/diffusers
        models/transformers/hunyuan_transformer_2d.py (Apache-2.0): AdaLayerNormShift.
    """

    name = "hunyuan_shift"
    Config = HunyuanShiftConfig
    kinds = frozenset({"global", "aligned", "rows"})
    site_params = True
    generate = condmod.generate_linear

    def __init__(self, config: HunyuanShiftConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.norm = normalisation(
            "layer", site.features, site.channel_dim, affine="both", eps=config.eps
        )
        self.proj = blank_linear(self.condition_dim, site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.norm.reset_parameters()
        self.proj.reset_parameters()
        if self.config.init == "identity":
            reset_constant(self.proj, (0,))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return nn.functional.silu(self.accept(condition))

    def unpack(self, projected: Tensor) -> Shift:
        """The projection's output as shift."""
        return Shift(projected)

    def modulate(self, x: Tensor, modulation: Shift) -> Tensor:
        """LN(x) + shift."""
        dim = self.site.channel_dim
        return add_shift(x, modulation.shift, dim, norm=self.norm, where=self.where)
