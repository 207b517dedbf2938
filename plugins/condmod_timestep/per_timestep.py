"""A modulator of features by a raw timestep."""

from typing import Any

from torch import Tensor

import condmod


class PerTimestepConfig(condmod.ModulatorConfig):
    """Options of `per_timestep`."""

    inner: condmod.ModulatorSpec = "film"
    """What modulates the features; takes a global or an aligned condition."""
    encoder: condmod.EncoderSpec = "timestep"
    """What turns the time into the inner modulator's condition, at its native width."""


class PerTimestep(condmod.Modulator[PerTimestepConfig, Any]):
    """A modulator with an encoder of its own: y = inner(x, encoder(t)).

    Shapes:
        x (B, ..., C) or (B, C, ...) with t (B,); x (B, T, C) or (B, C, T) with t (B,) or (B, T).

    Init:
        that of `inner` and `encoder`, the encoder drawn first; the identity through
        inner=film(init='identity').

    Source:
        One time for each sample as in DDPM and ADM, arXiv:2006.11239 and arXiv:2105.05233; one
        for each frame as in Diffusion Forcing, Chen et al., 2024, arXiv:2407.01392.
    """

    name = "per_timestep"
    Config = PerTimestepConfig
    kinds = frozenset({"raw"})

    def __init__(self, config: PerTimestepConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.encoder, self.inner = condmod.create_with_encoder(config.inner, config.encoder, site)
        self.site_params = self.inner.site_params

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.encoder.reset_parameters()
        self.inner.reset_parameters()

    def generate(self, condition: condmod.Condition) -> Any:
        """The inner modulator's modulation for a time (B,) or (B, T)."""
        return condmod.generate_owned(self, condition)

    def modulate(self, x: Tensor, modulation: Any) -> Tensor:
        """What the inner modulator makes of the features."""
        return condmod.modulate_owned(self, x, modulation)
