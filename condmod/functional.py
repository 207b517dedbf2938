"""The passes over the features, and what generators share.

Shapes: B batch, C features, D condition.

A modulation's leaf is (B, C) for a global condition or (B, *positions, C) for an aligned one,
always with C last; features have C at `channel_dim`, 1 or -1. Half-precision features are
modulated in float32 and rounded once, so `1 + scale` keeps small scales.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from condmod.errors import ShapeError

ScaleForm = Literal["raw", "one_plus", "sigmoid", "exp", "one_plus_tanh"]
Activation = Literal["none", "relu", "gelu", "silu", "mish"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
}


class ScaleShift(NamedTuple):
    """What an affine modulation needs at one place: leaves (B, C) or (B, *positions, C)."""

    scale: Tensor
    shift: Tensor


class ScaleShiftGate(NamedTuple):
    """An affine modulation before a sublayer and a gate behind it; leaves as in ScaleShift."""

    scale: Tensor
    shift: Tensor
    gate: Tensor


class Shift(NamedTuple):
    """An additive modulation; the leaf as in ScaleShift."""

    shift: Tensor


def align(
    x: Tensor, leaf: Tensor, channel_dim: int = -1, *, where: Callable[[], str] = str
) -> Tensor:
    """View a leaf (B, C) or (B, *positions, C) so that it broadcasts against x; no copy.

    Args:
        x: features (B, ..., C, ...), with C at `channel_dim`.
        leaf: a modulation's tensor, C last.
        channel_dim: 1 or -1.
        where: gives the name of the place for an error; called only then, so that a compiled
            graph does not depend on it.

    Raises:
        ShapeError: the leaf is neither global nor aligned to x; nothing broadcasts by chance.
    """
    if leaf.ndim == 2:
        expected = (x.shape[0], x.shape[channel_dim])
        if tuple(leaf.shape) == expected:
            middle = [1] * (x.ndim - 2)
            if channel_dim == 1:
                return leaf.reshape(*expected, *middle)
            return leaf.reshape(expected[0], *middle, expected[1])
    elif leaf.ndim == x.ndim:
        aligned = leaf if channel_dim == -1 else leaf.movedim(-1, 1)
        if aligned.shape == x.shape:
            return aligned
    raise ShapeError(
        f"modulation {tuple(leaf.shape)} does not fit features {tuple(x.shape)} with channels "
        f"at dim {channel_dim}{_in(where)}; a global one is (B, C), an aligned one has a vector "
        "of C per position of the features, and neither broadcasts"
    )


def featurewise_affine(
    x: Float[Tensor, "B ..."],
    modulation: tuple[Tensor, Tensor],
    channel_dim: int = -1,
    *,
    form: ScaleForm = "one_plus",
    residual: bool = False,
    where: Callable[[], str] = str,
) -> Float[Tensor, "B ..."]:
    """y = m(scale)·x + shift, by default (1 + scale)·x + shift.

    Args:
        x: features (B, ..., C, ...), any rank from 2, with C at `channel_dim`.
        modulation: (scale, shift), each (B, C) or (B, *positions, C).
        channel_dim: 1 or -1.
        form: m; raw is scale, one_plus 1 + scale, sigmoid σ(scale), exp exp(scale),
            one_plus_tanh 1 + tanh(scale).
        residual: add x, as in x + (1 + scale)·x + shift.
        where: gives the name of the place for an error.

    Returns:
        The shape, dtype and device of x; m and the sum are in float32 for half precision.

    Raises:
        ShapeError: a leaf is neither global nor aligned to x; x is not floating.
    """
    wide = _wide(x, where)
    scale, shift = (align(x, leaf, channel_dim, where=where).to(wide) for leaf in modulation)
    factor = _multiplier(form, scale)
    y = torch.addcmul(shift, x.to(wide), factor + 1 if residual else factor)
    return in_layout_of(x, y.to(x.dtype))


def gated_residual(
    x: Float[Tensor, "B ..."],
    y: Float[Tensor, "B ..."],
    gate: Tensor,
    channel_dim: int = -1,
    *,
    where: Callable[[], str] = str,
) -> Float[Tensor, "B ..."]:
    """x + gate·y, with gate (B, C) or (B, *positions, C).

    Returns:
        The shape, dtype and device of x; half precision is computed in float32.

    Raises:
        ShapeError: y has another shape than x, the gate fits neither, or x is not floating.
    """
    if y.shape != x.shape:
        raise ShapeError(
            f"the sublayer turned features {tuple(x.shape)} into {tuple(y.shape)}"
            f"{_in(where)}; a residual needs equal shapes"
        )
    wide = _wide(x, where)
    gate = align(x, gate, channel_dim, where=where).to(wide)
    return in_layout_of(x, torch.addcmul(x.to(wide), y.to(wide), gate).to(x.dtype))


def add_shift(
    x: Tensor, shift: Tensor, channel_dim: int = -1, *, where: Callable[[], str] = str
) -> Tensor:
    """x + shift, with shift (B, C) or (B, *positions, C); dtype of x, half via float32.

    Raises:
        ShapeError: the shift is neither global nor aligned to x, or x is not floating.
    """
    wide = _wide(x, where)
    y = x.to(wide) + align(x, shift, channel_dim, where=where).to(wide)
    return in_layout_of(x, y.to(x.dtype))


def layer_norm(x: Tensor, channel_dim: int = -1, eps: float = 1e-6) -> Tensor:
    """Parameter-free LayerNorm over the channels of each position; shape and dtype of x."""
    features = (x.shape[channel_dim],)
    if channel_dim == -1:
        return F.layer_norm(x, features, eps=eps).to(x.dtype)
    normed = F.layer_norm(x.movedim(1, -1), features, eps=eps).movedim(-1, 1)
    return in_layout_of(x, normed.to(x.dtype))


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """Y, contiguous where x is; a pass that moves dims around gives back the layout it took."""
    return y.contiguous() if x.is_contiguous() else y


def activation(name: Activation) -> nn.Module:
    """A parameter-free activation by its config name."""
    return _ACTIVATIONS[name]()


def blank_linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """A Linear whose memory is not filled: `reset_parameters` of its owner draws it, once."""
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta")
    return layer.to_empty(device=torch.get_default_device())


def mlp(widths: Sequence[int], act: Activation) -> nn.Sequential:
    """Linear and activation in turn, through `widths` (input width first); blank, as above."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [blank_linear(before, after), activation(act)]
    return nn.Sequential(*layers)


def reset_linears(module: nn.Module) -> None:
    """Draw every Linear inside `module` as torch does, in order of registration."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()


def reset_chunks(layer: nn.Linear, chunks: int) -> None:
    """Draw a fused Linear as `chunks` separate Linears drawn one after the other would be."""
    rows = layer.out_features // chunks
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    parts = [nn.Linear(layer.in_features, rows, **like) for _ in range(chunks)]
    fill(layer.weight, torch.cat([part.weight for part in parts]))
    fill(layer.bias, torch.cat([part.bias for part in parts]))


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter, which may be sharded (a DTensor) or on meta.

    In-place writes to a chunk of a DTensor are lost; a start that differs between the parts of
    a parameter is computed as a whole and written by this.
    """
    with torch.no_grad():
        if hasattr(parameter, "placements"):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(parameter, DTensor)
            value = distribute_tensor(
                value.detach().to(parameter.device), parameter.device_mesh, parameter.placements
            )
        parameter.copy_(value)


def _multiplier(form: ScaleForm, scale: Tensor) -> Tensor:
    match form:
        case "one_plus":
            return scale + 1
        case "sigmoid":
            return scale.sigmoid()
        case "exp":
            return scale.exp()
        case "one_plus_tanh":
            return scale.tanh() + 1
    return scale


def _wide(x: Tensor, where: Callable[[], str]) -> torch.dtype:
    """The dtype to compute in: float32 for half precision."""
    if not x.is_floating_point():
        raise ShapeError(f"features are floating; got {x.dtype}{_in(where)}")
    return torch.float32 if x.dtype in {torch.float16, torch.bfloat16} else x.dtype


def _in(where: Callable[[], str]) -> str:
    place = where()
    return f" in {place}" if place else ""
