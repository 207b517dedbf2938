"""LayerScale whose factors a condition sets."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import Gate, blank_linear, gated_residual, reset_constant


class AdaptiveLayerScaleConfig(condmod.ModulatorConfig):
    """Options of `adaptive_layer_scale`."""

    gate_bias: Annotated[float, Field(ge=-20.0, le=20.0)] = -2.0
    """Where the gate's bias starts; σ(-2) is about 0.12."""


class AdaptiveLayerScale(condmod.SublayerModulator[AdaptiveLayerScaleConfig, Gate]):
    """Adaptive LayerScale: x + σ(gate)·f(x), with gate = W·c + b, around one sublayer f.

    No norm before f, and no activation before W.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        weight 0, bias -2, so y = x + 0.12·f(x); a gate of 1 is out of a sigmoid's reach.

    Source:
        lucidrains/x-transformers x_transformers.py: AdaptiveLayerScale, and
        lucidrains/transfusion-pytorch transfusion.py (both MIT).
    """

    name = "adaptive_layer_scale"
    Config = AdaptiveLayerScaleConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: AdaptiveLayerScaleConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.proj = blank_linear(self.condition_dim, site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter as at the start; nothing is random."""
        reset_constant(self.proj, (self.config.gate_bias,))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> tuple[Gate]:
        """The projection's output as the one part's gate."""
        return (Gate(projected),)

    def enter(
        self,
        x: Tensor,
        modulation: Gate,  # noqa: ARG002
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """The features as they are."""
        return x

    def exit(
        self,
        x: Tensor,
        y: Tensor,
        modulation: Gate,
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """X plus σ(gate) times the output of the sublayer."""
        dim = self.site.channel_dim
        return gated_residual(x, y, modulation.gate, dim, form="sigmoid", where=self.where)
