"""An embedding of one real number."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import Activation, blank_linear, mlp, reset_linears


class ScalarConfig(condmod.NullableConfig):
    """Options of `scalar`."""

    dim: condmod.Width = 256
    """Width of what comes out, where nothing else sets it."""
    mean: Annotated[float, Field(ge=-1e9, le=1e9)] = 0.0
    """Subtracted from the number first."""
    std: Annotated[float, Field(gt=0.0, le=1e9)] = 1.0
    """What the number is then divided by, so that it comes to order one."""
    hidden: tuple[condmod.Width, ...] = (256,)
    """Widths of hidden layers."""
    activation: Activation = "silu"
    """Activation behind each hidden layer."""


class Scalar(condmod.Encoder[ScalarConfig]):
    """MLP of one number: e = W₂·silu(W₁·(v - mean)/std + b₁) + b₂.

    The number is standardised in float32 (or float64) before anything is rounded to the
    module's dtype. Where the response must be sharp, take `fourier`.

    Shapes:
        v (B,) -> (B, D), or (B, T) with a mask (B, T) if need be -> (B, T, D); integer or
        floating. Several numbers of one sample are a `vector`.

    Init:
        torch's Linear default.

    Source:
        The plain form in common practice.
    """

    name = "scalar"
    Config = ScalarConfig

    def __init__(self, config: ScalarConfig, out_dim: int | None) -> None:
        super().__init__(config, out_dim or config.dim)
        widths = (1, *config.hidden)
        self.hidden = mlp(widths, config.activation)
        self.proj = blank_linear(widths[-1], self.out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        reset_linears(self.hidden)
        self.proj.reset_parameters()
        self.reset_null()

    def encode(self, signal: condmod.Signal) -> Tensor:
        """Numbers (B,) or (B, T) to (B, D) or (B, T, D)."""
        shapes = {1: "one number per sample, (B,),", 2: "per position, (B, T)"}
        value = self.read(signal, shapes)
        if value.dtype == torch.bool or value.is_complex():
            raise condmod.ConditionError(f"scalar takes real numbers; got {value.dtype}")
        wide = torch.promote_types(torch.float32, self.dtype)
        unit = (
            value.to(torch.promote_types(wide, value.dtype)) - self.config.mean
        ) / self.config.std
        unit = unit.to(self.dtype)
        projected: Tensor = self.proj(self.hidden(unit[..., None]))
        return projected
