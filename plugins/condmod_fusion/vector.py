"""A projection of a given vector."""

from torch import Tensor

import condmod
from condmod.functional import Activation, blank_linear, mlp, reset_linears


class VectorConfig(condmod.NullableConfig):
    """Options of `vector`."""

    features: condmod.Width
    """F, the width of the vector that comes in."""
    dim: condmod.Width = 256
    """Width of what comes out, where nothing else sets it."""
    hidden: tuple[condmod.Width, ...] = ()
    """Widths of hidden layers; (D,) is Linear, activation, Linear."""
    activation: Activation = "silu"
    """Activation behind each hidden layer."""


class Vector(condmod.Encoder[VectorConfig]):
    """Linear: e = W·v + b, behind hidden layers where there are some.

    Shapes:
        v (B, F) -> (B, D), or (B, T, F) with a mask (B, T) if need be -> (B, T, D); floating.

    Init:
        torch's Linear default.

    Source:
        The plain form in common practice; with one hidden layer, the pooled text projection of
        Stable Diffusion 3, Esser et al., 2024, arXiv:2403.03206.
    """

    name = "vector"
    Config = VectorConfig

    def __init__(self, config: VectorConfig, out_dim: int | None) -> None:
        super().__init__(config, out_dim or config.dim)
        widths = (config.features, *config.hidden)
        self.hidden = mlp(widths, config.activation)
        self.proj = blank_linear(widths[-1], self.out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        reset_linears(self.hidden)
        self.proj.reset_parameters()
        self.reset_null()

    def encode(self, signal: condmod.Signal) -> Tensor:
        """Vectors (B, F) or (B, T, F) to (B, D) or (B, T, D)."""
        width = self.config.features
        shapes = {2: f"one vector per sample, (B, {width}),", 3: f"per position, (B, T, {width})"}
        value = self.read(signal, shapes)
        if not value.is_floating_point():
            raise condmod.ConditionError(f"vector takes floating vectors; got {value.dtype}")
        if value.shape[-1] != width:
            raise condmod.ShapeError(
                f"vector takes vectors of features={width}; got {tuple(value.shape)}"
            )
        projected: Tensor = self.proj(self.hidden(value.to(self.dtype)))
        return projected
