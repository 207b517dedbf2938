"""Fused passes in Triton, forward and backward; triton is imported when one first runs.

A leaf is global (B, C), aligned (the shape of the features, any strides), or, if there is an
`index` (B, *positions), rows (B, R, C). Half precision is computed in float32 and rounded once.
Backward keeps inputs and, for a norm, two numbers for each position (each channel of a sample for
norm group). No atomics: the same call gives the same bits.

Not served: an aligned leaf beside an index, leaves with different indices, second and forward-mode
derivatives (they raise). vmap runs sample by sample, as torch warns.
"""

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from condmod.functional.kernels import ops, rules  # noqa: F401  rules gives ops their gradients

__all__ = ["gate_residual", "gate_residual_norm_affine", "norm_affine", "unavailable", "unserved"]


def unavailable(device: torch.device) -> str:
    """Why the kernels cannot run on a device, or nothing where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'condmod[triton]'"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"triton kernels run on a GPU, the features are on {device.type}; move them, or set "
            "TRITON_INTERPRET=1 before triton is imported to try them slowly"
        )
    return ""


def unserved(*parts: Tensor | None) -> str:
    """Why the kernels cannot serve these tensors, or nothing where they can."""
    if torch.compiler.is_compiling():
        return ""  # the compiler knows no tangents either
    unpacked = [unpack_dual(part) for part in parts if part is not None]  # type: ignore[no-untyped-call]  # torch's
    if any(tangent is not None for _, tangent in unpacked):
        return "triton kernels have no forward-mode derivatives; take the backend eager for them"
    return ""


def norm_affine(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    channel_dim: int = -1,
    index: Tensor | None = None,
    plus: float = 0.0,
    norm: Literal["layer", "rms", "group"] | None = None,
    groups: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """(plus + scale)·norm(x) + shift in one pass, two for norm group.

    Args:
        x: features (B, ..., C, ...), floating, any strides.
        scale: a leaf; without it the factor is 1 whatever `plus`.
        shift: a leaf.
        channel_dim: 1 or -1.
        index: the rows of the positions, (B, *positions); a row that is not there gives NaN.
        plus: added to the scale in the wide dtype.
        norm: layer and rms are over the channels of each position, group over a group of channels
            and all positions of a sample.
        groups: for norm group; divides C.
        eps: added to the variance, or to the mean square.

    Returns:
        The shape and dtype of x, contiguous, or with channels last in memory as x.

    Raises:
        NotImplementedError: a tensor carries a tangent, which would be lost.
    """
    _refuse(x, scale, shift)
    args = (scale, shift, index, channel_dim, plus, norm or "none", groups, eps)
    out: Tensor = ops.norm_affine(x, *args)[0]
    return out


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    *,
    channel_dim: int = -1,
    index: Tensor | None = None,
    plus: float = 0.0,
) -> Tensor:
    """x + (plus + gate)·y in one pass; y has the shape of x, the rest is as in `norm_affine`."""
    _refuse(x, y, gate)
    joined: Tensor = ops.gate_residual(x, y, gate, index, channel_dim, plus)
    return joined


def gate_residual_norm_affine(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    channel_dim: int = -1,
    index: Tensor | None = None,
    gate_plus: float = 0.0,
    plus: float = 0.0,
    norm: Literal["layer", "rms"] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """h = x + (gate_plus + gate)·y and (plus + scale)·norm(h) + shift in one pass.

    The norm reads h before it is rounded. Arguments as in `norm_affine`.
    """
    _refuse(x, y, gate, scale, shift)
    joined, out, _ = ops.gate_residual_norm_affine(
        x, y, gate, scale, shift, index, channel_dim, gate_plus, plus, norm or "none", eps
    )
    return joined, out


def _refuse(*parts: Tensor | None) -> None:
    reason = unserved(*parts)
    if reason:
        raise NotImplementedError(reason)
