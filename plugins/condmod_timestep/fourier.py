"""Gaussian Fourier features of a noise level, in the forms of score_sde, EDM and EDM2."""

import math
from collections.abc import Callable
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import condmod
from condmod.functional import Activation, blank_linear, mlp, reset_linears
from condmod_timestep.time import read_time


class FourierConfig(condmod.NullableConfig):
    """Options of `fourier`."""

    dim: condmod.Width = 256
    """Number of features; even for sines and cosines, which share frequencies."""
    form: Literal["sin_cos", "cos_sin", "cos_phase"] = "sin_cos"
    """sin‖cos (score_sde), cos‖sin (EDM), or √2·cos with random phases (EDM2)."""
    std: Annotated[float, Field(gt=0.0, le=1e6)] = 16.0
    """Standard deviation of the frequencies: 16 in score_sde and EDM, 1 in EDM2."""
    learned: bool = False
    """Train the frequencies."""
    with_input: bool = False
    """Put the time itself before its features, one more channel (lucidrains)."""
    hidden: tuple[condmod.Width, ...] = ()
    """Widths of hidden layers behind the features."""
    activation: Activation = "silu"
    """Activation behind each hidden layer."""

    @model_validator(mode="after")
    def _halves_are_equal(self) -> Self:
        if self.form != "cos_phase" and self.dim % 2:
            raise ValueError(f"form={self.form!r} needs an even dim; got dim={self.dim}")
        return self


class Fourier(condmod.Encoder[FourierConfig]):
    """Fourier features of a time x: [sin(2πfx), cos(2πfx)] or √2·cos(2πfx + φ), f ~ N(0, std²).

    φ is uniform on [0, 2π). The frequencies are drawn once and fixed, or learned; either way
    they are in the state dict, and a conversion to half precision leaves them in float32, where
    the features are computed (in float64 where the time or the module is). Best for x of order
    one, such as log σ / 4: the angle of a large x is beyond what float32 resolves.

    Shapes:
        x (B,) -> (B, D), or (B, T) with a mask (B, T) if need be -> (B, T, D); integer, float32
        or float64. The native D is the last hidden width, or `dim` (+ 1 with `with_input`).

    Init:
        published: frequencies as above; torch's Linear default behind them.

    Source:
        Tancik et al., Fourier Features Let Networks Learn High Frequency Functions, 2020,
        arXiv:2006.10739; Song et al., 2021, arXiv:2011.13456 (score_sde); Karras et al., 2022,
        arXiv:2206.00364 (EDM); Karras et al., 2024, arXiv:2312.02696 (EDM2);
        lucidrains/denoising-diffusion-pytorch (MIT; std 1, with_input, learned or not).
    """

    name = "fourier"
    Config = FourierConfig

    def __init__(self, config: FourierConfig, out_dim: int | None) -> None:
        widths = (config.dim + config.with_input, *config.hidden)
        super().__init__(config, out_dim or widths[-1])
        self.features = _Features(config)
        self.hidden = mlp(widths, config.activation)
        plain = not config.hidden and self.out_dim == widths[0]
        self.proj = nn.Identity() if plain else blank_linear(widths[-1], self.out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter and every frequency afresh."""
        self.features.reset_parameters()
        reset_linears(self.hidden)
        reset_linears(self.proj)
        self.reset_null()

    def encode(self, signal: condmod.Signal) -> Tensor:
        """Time (B,) or (B, T) to (B, D) or (B, T, D)."""
        features = self.features(read_time(self, signal)).to(self.dtype)
        projected: Tensor = self.proj(self.hidden(features))
        return projected


class _Features(nn.Module):
    """The frequencies and what they make of a time; stays in float32 under `.to(bfloat16)`."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, config: FourierConfig) -> None:
        super().__init__()
        self.config = config
        phased = config.form == "cos_phase"
        count = config.dim if phased else config.dim // 2
        frequencies = torch.empty(count, dtype=torch.float32)
        if config.learned:
            self.frequencies = nn.Parameter(frequencies)
        else:
            self.register_buffer("frequencies", frequencies)
        if phased:
            self.register_buffer("phases", torch.empty(count, dtype=torch.float32))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.frequencies, std=self.config.std)
        if self.config.form == "cos_phase":
            nn.init.uniform_(self.phases, 0.0, 2 * math.pi)

    def forward(self, time: Tensor) -> Tensor:
        angle = time[..., None] * (2 * math.pi * self.frequencies.to(time.dtype))
        if self.config.form == "cos_phase":
            waves = [math.sqrt(2) * (angle + self.phases.to(time.dtype)).cos()]
        elif self.config.form == "cos_sin":
            waves = [angle.cos(), angle.sin()]
        else:
            waves = [angle.sin(), angle.cos()]
        return torch.cat([time[..., None], *waves] if self.config.with_input else waves, dim=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            half = moved.dtype in {torch.bfloat16, torch.float16}
            return tensor.to(moved.device, torch.float32) if half else moved

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self
