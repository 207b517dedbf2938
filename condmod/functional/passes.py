"""The passes over the features: every one that a mechanism makes goes through here.

Shapes: B batch, C features, D condition.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from condmod.functional.backends import run_affine, run_gate, run_gate_affine
from condmod.functional.eager import Affine
from condmod.functional.layout import Pass, in_layout_of, same_shape
from condmod.functional.norms import layer_normed
from condmod.functional.parts import GateForm, Leaf, ScaleForm


def featurewise_affine(
    x: Float[Tensor, "B ..."],
    modulation: tuple[Leaf, Leaf],
    channel_dim: int = -1,
    *,
    form: ScaleForm = "one_plus",
    residual: bool = False,
    norm: Pass | None = None,
    where: Callable[[], str] = str,
) -> Float[Tensor, "B ..."]:
    """y = m(scale)·norm(x) + shift, by default (1 + scale)·x + shift.

    Args:
        x: features (B, ..., C, ...), any rank from 2, with C at `channel_dim`.
        modulation: (scale, shift), each (B, C), (B, *positions, C) or Indexed.
        channel_dim: 1 or -1.
        form: m; raw is scale, one_plus 1 + scale, sigmoid σ(scale), exp exp(scale),
            one_plus_tanh 1 + tanh(scale).
        residual: add x, as in x + (1 + scale)·x + shift.
        norm: what x goes through first, in the wide dtype, as a module of `normalisation` does.
        where: gives the name of the place for an error.

    Returns:
        The shape, dtype and device of x; norm, m and the sum are in float32 for half precision,
        and rounded once.

    Raises:
        ShapeError: a leaf is neither global nor aligned to x; x is not floating.
    """
    scale, shift = modulation
    return run_affine(x, Affine(scale, shift, channel_dim, form, norm, where, residual))


def featurewise_scale(
    x: Float[Tensor, "B ..."],
    scale: Leaf,
    channel_dim: int = -1,
    *,
    form: ScaleForm = "one_plus",
    norm: Pass | None = None,
    where: Callable[[], str] = str,
) -> Float[Tensor, "B ..."]:
    """y = m(scale)·norm(x), by default (1 + scale)·x; arguments as in `featurewise_affine`."""
    return run_affine(x, Affine(scale, None, channel_dim, form, norm, where))


def add_shift(
    x: Float[Tensor, "B ..."],
    shift: Leaf,
    channel_dim: int = -1,
    *,
    norm: Pass | None = None,
    where: Callable[[], str] = str,
) -> Float[Tensor, "B ..."]:
    """y = norm(x) + shift; arguments as in `featurewise_affine`."""
    return run_affine(x, Affine(None, shift, channel_dim, "raw", norm, where))


def gated_residual(
    x: Float[Tensor, "B ..."],
    y: Float[Tensor, "B ..."],
    gate: Leaf,
    channel_dim: int = -1,
    *,
    form: GateForm = "linear",
    norm: Pass | None = None,
    where: Callable[[], str] = str,
) -> Float[Tensor, "B ..."]:
    """x + g(gate)·norm(y), by default x + gate·y.

    Args:
        x: features (B, ..., C, ...), with C at `channel_dim`.
        y: what a sublayer made of them, of the same shape.
        gate: (B, C), (B, *positions, C) or Indexed.
        channel_dim: 1 or -1.
        form: g; linear is gate, one_plus 1 + gate, tanh tanh(gate), sigmoid σ(gate),
            sigmoid_one_minus σ(1 - gate).
        norm: what y goes through first, in the wide dtype.
        where: gives the name of the place for an error.

    Returns:
        The shape, dtype and device of x; half precision is computed in float32.

    Raises:
        ShapeError: y has another shape than x, the gate fits neither, or x is not floating.
    """
    same_shape(x, y, where)
    return run_gate(x, y, Affine(gate, None, channel_dim, form, norm, where))


def gated_residual_affine(
    x: Float[Tensor, "B ..."],
    y: Float[Tensor, "B ..."],
    gate: Leaf,
    modulation: tuple[Leaf, Leaf],
    channel_dim: int = -1,
    *,
    gate_form: GateForm = "linear",
    form: ScaleForm = "one_plus",
    norm: Pass | None = None,
    where: Callable[[], str] = str,
) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B ..."]]:
    """h = x + g(gate)·y, and m(scale)·norm(h) + shift: from one sublayer to the next.

    Args:
        x: features (B, ..., C, ...), with C at `channel_dim`.
        y: what a sublayer made of them, of the same shape.
        gate: as in `gated_residual`.
        modulation: (scale, shift) as in `featurewise_affine`.
        channel_dim: 1 or -1.
        gate_form: g.
        form: m.
        norm: what h goes through, as in `featurewise_affine`.
        where: gives the name of the place for an error.

    Returns:
        h, and what the next sublayer reads, both of the shape, dtype and device of x. A fused
        kernel norms h before it is rounded to half precision.

    Raises:
        ShapeError: as the two passes alone.
    """
    same_shape(x, y, where)
    scale, shift = modulation
    opened = Affine(gate, None, channel_dim, gate_form, None, where)
    return run_gate_affine(x, y, opened, Affine(scale, shift, channel_dim, form, norm, where))


def layer_norm(x: Tensor, channel_dim: int = -1, eps: float = 1e-6) -> Tensor:
    """Parameter-free LayerNorm over the channels of each position; shape and dtype of x."""
    normed = layer_normed(x.movedim(channel_dim, -1), None, None, eps)
    return in_layout_of(x, normed.to(x.dtype).movedim(-1, channel_dim))
