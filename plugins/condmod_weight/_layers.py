"""The layers whose weight a modulator can read, and what it reads of it."""

from typing import Any

import torch
from torch import Tensor, nn

from condmod.functional import unhalved

_READABLE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def refused(layer: Any) -> str:
    """Why a layer's weight cannot be read; "" where it can."""
    kind = type(layer).__name__
    home = f" of {type(layer).__module__}" if isinstance(layer, nn.Module) else ""
    cls = next((cls for cls in _READABLE if isinstance(layer, cls)), None)
    if cls is None:
        return (
            "it reads the weight of an nn.Linear, an nn.Conv1d to 3d or an nn.ConvTranspose1d to "
            f"3d; got a {kind}{home}"
        )
    forward = type(layer).forward
    if getattr(forward, "__wrapped__", forward) is not cls.forward:  # attach wraps it
        return (
            f"a {kind} has a forward of its own, which may use its weight in another way than "
            f"nn.{cls.__name__} does"
        )
    weight = layer.weight
    if not weight.is_floating_point() or hasattr(weight, "__tensor_flatten__"):
        return (
            f"it reads a weight that is a plain floating tensor; got {weight.dtype} in a "
            f"{type(weight).__name__}, as quantised or sharded layers have"
        )
    return ""


def sizes(layer: nn.Module) -> tuple[int, int, int]:
    """The channels that a layer reads and gives, and the dim at which it has them."""
    own: Any = layer
    if isinstance(layer, nn.Linear):
        return own.in_features, own.out_features, -1
    return own.in_channels, own.out_channels, 1


def energy(layer: nn.Module, style: Tensor) -> Tensor:
    """Σ(W·s)² over all that each output channel reads, (B, O), in float32 at least.

    W is (O, I, *kernel), of a transposed convolution (I, O, *kernel), the second of them of one
    group. W² is summed over the kernel first: nothing of the size of W is made for each sample.

    Args:
        layer: one that is not refused.
        style: s, (B, C).
    """
    weight: Any = layer.weight
    groups: Any = getattr(layer, "groups", 1)
    wide = torch.promote_types(weight.dtype, torch.float32)
    with unhalved(style):
        squares = weight.to(wide).square().reshape(*weight.shape[:2], -1).sum(-1)
        grouped = squares.reshape(groups, -1, weight.shape[1])
        letters = "gio" if getattr(layer, "transposed", False) else "goi"
        parts = torch.unflatten(style.to(wide).square(), 1, (groups, -1))
        return torch.einsum(f"bgi,{letters}->bgo", parts, grouped).flatten(1)
