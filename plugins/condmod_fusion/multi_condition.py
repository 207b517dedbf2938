"""A modulator of features by several raw signals."""

from typing import Any

from torch import Tensor

import condmod


class MultiConditionConfig(condmod.ModulatorConfig):
    """Options of `multi_condition`."""

    inner: condmod.ModulatorSpec = "dense_film"
    """What modulates the features; takes a global or an aligned condition."""
    encoder: condmod.EncoderSpec
    """What turns the signals into the inner modulator's condition; most often a `fuse`."""


class MultiCondition(condmod.Modulator[MultiConditionConfig, Any]):
    """A modulator with an encoder of several signals: y = inner(x, encoder({name: signal, ...})).

    Shapes:
        x (B, ..., C) or (B, C, ...) with signals that are global; x (B, T, C) or (B, C, T)
        where one of them has a value per position, T.

    Init:
        that of `inner` and `encoder`, the encoder drawn first; the identity through
        inner=dense_film(init='identity').

    Source:
        Class and timestep together steer every layer as in ADM and DiT, arXiv:2105.05233 and
        arXiv:2212.09748, whose embeddings are summed.
    """

    name = "multi_condition"
    Config = MultiConditionConfig
    kinds = frozenset({"raw"})

    def __init__(self, config: MultiConditionConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.encoder, self.inner = condmod.create_with_encoder(config.inner, config.encoder, site)
        self.site_params = self.inner.site_params

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.encoder.reset_parameters()
        self.inner.reset_parameters()

    def generate(self, condition: condmod.Condition) -> Any:
        """The inner modulator's modulation for a mapping of signals."""
        return condmod.generate_owned(self, condition)

    def modulate(self, x: Tensor, modulation: Any) -> Tensor:
        """What the inner modulator makes of the features."""
        return condmod.modulate_owned(self, x, modulation)
