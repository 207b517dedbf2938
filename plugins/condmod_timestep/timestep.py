"""Sinusoids of a timestep, in the forms of DDPM, ADM, DiT, Flux and EDM."""

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import condmod
from condmod.functional import Activation, blank_linear, mlp, reset_linears
from condmod_timestep.time import read_time


class TimestepConfig(condmod.NullableConfig):
    """Options of `timestep`."""

    dim: Annotated[int, Field(ge=2, le=65536)] = 256
    """Width of the sinusoid; an odd one ends in a zero."""
    order: Literal["cos_sin", "sin_cos"] = "cos_sin"
    """Which half comes first: cosines (ADM, DiT, Flux) or sines (DDPM, EDGE)."""
    endpoint: bool = False
    """Whether the slowest frequency is 1/max_period itself: exponents over half - 1, not half."""
    max_period: Annotated[float, Field(ge=1.0, le=1e9)] = 10000.0
    """P, the slowest frequency is about 1/P."""
    scale: Annotated[float, Field(gt=0.0, le=1e9)] = 1.0
    """Factor on the time: 1000 where it runs from 0 to 1, as in Flux."""
    hidden: tuple[condmod.Width, ...] = ()
    """Widths of hidden layers behind the sinusoid; (D,) is DiT's Linear, SiLU, Linear."""
    activation: Activation = "silu"
    """Activation behind each hidden layer."""

    @model_validator(mode="after")
    def _endpoint_needs_two(self) -> Self:
        if self.endpoint and self.dim < 4:
            raise ValueError(
                f"endpoint=True needs two frequencies or more, dim >= 4; got dim={self.dim}"
            )
        return self


class Timestep(condmod.Encoder[TimestepConfig]):
    """Sinusoid: [cos(scale·t·ω), sin(scale·t·ω)] with ω_i = P^(-i/(h - e)), h = dim // 2.

    e is 1 with `endpoint`, else 0. The sinusoid goes through the hidden layers and a last
    Linear to the output's width; without hidden layers and at its native width it is the output.
    It is computed in float32, or in float64 where the time or the module is float64, whatever
    the module's dtype; a time in half precision is refused, for it is already rounded.

    Shapes:
        time (B,) -> (B, D), or (B, T) with a mask (B, T) if need be -> (B, T, D); integer,
        float32 or float64. The native D is the last hidden width, or `dim`.

    Init:
        published: torch's Linear default (ADM).

    Source:
        Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239
        (sin_cos, endpoint); openai/guided-diffusion nn.py (MIT) and facebookresearch/DiT
        (cos_sin); Flux (cos_sin, scale 1000); NVlabs/edm (cos_sin, endpoint as a flag).
    """

    name = "timestep"
    Config = TimestepConfig

    def __init__(self, config: TimestepConfig, out_dim: int | None) -> None:
        widths = (config.dim, *config.hidden)
        super().__init__(config, out_dim or widths[-1])
        self.hidden = mlp(widths, config.activation)
        plain = not config.hidden and self.out_dim == config.dim
        self.proj = nn.Identity() if plain else blank_linear(widths[-1], self.out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        reset_linears(self.hidden)
        reset_linears(self.proj)
        self.reset_null()

    def encode(self, signal: condmod.Signal) -> Tensor:
        """Time (B,) or (B, T) to (B, D) or (B, T, D)."""
        sinusoid = self._sinusoid(read_time(self, signal)).to(self.dtype)
        projected: Tensor = self.proj(self.hidden(sinusoid))
        return projected

    def _sinusoid(self, time: Tensor) -> Tensor:
        # frequencies are computed here: as a buffer they would be rounded by .to(bfloat16)
        config = self.config
        half = config.dim // 2
        steps = torch.arange(half, dtype=time.dtype, device=time.device)
        exponent = -math.log(config.max_period) * steps / (half - config.endpoint)
        angle = config.scale * (time[..., None] * exponent.exp())
        waves = [angle.cos(), angle.sin()]
        if config.order == "sin_cos":
            waves.reverse()
        return nn.functional.pad(torch.cat(waves, dim=-1), (0, config.dim % 2))
