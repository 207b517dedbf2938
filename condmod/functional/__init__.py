"""The passes over the features, and what generators share.

Shapes: B batch, C features, D condition, R rows of a table.

A modulation's leaf is (B, C) for a global condition, (B, *positions, C) for an aligned one, or
Indexed for a table of rows, always with C last; features have C at `channel_dim`, 1 or -1.
Half-precision features are modulated in float32 and rounded once, so `1 + scale` keeps small
scales.
"""

from condmod.functional.backends import Backend, backend, set_backend, use_backend
from condmod.functional.generators import (
    blank_linear,
    fill,
    low_rank,
    mlp,
    reset_chunks,
    reset_constant,
    reset_linears,
)
from condmod.functional.layout import (
    Pass,
    align,
    in_layout_of,
    same_shape,
    unhalved,
    widened,
)
from condmod.functional.norms import Affine, BatchNorm, Norm, NormKind, normalisation
from condmod.functional.parts import (
    Activation,
    Gate,
    GateForm,
    Indexed,
    Leaf,
    Nothing,
    Scale,
    ScaleForm,
    ScaleShift,
    ScaleShiftGate,
    Shift,
    activation,
    read,
)
from condmod.functional.passes import (
    add_shift,
    featurewise_affine,
    featurewise_scale,
    gated_residual,
    gated_residual_affine,
    layer_norm,
)

__all__ = [
    "Activation",
    "Affine",
    "Backend",
    "BatchNorm",
    "Gate",
    "GateForm",
    "Indexed",
    "Leaf",
    "Norm",
    "NormKind",
    "Nothing",
    "Pass",
    "Scale",
    "ScaleForm",
    "ScaleShift",
    "ScaleShiftGate",
    "Shift",
    "activation",
    "add_shift",
    "align",
    "backend",
    "blank_linear",
    "featurewise_affine",
    "featurewise_scale",
    "fill",
    "gated_residual",
    "gated_residual_affine",
    "in_layout_of",
    "layer_norm",
    "low_rank",
    "mlp",
    "normalisation",
    "read",
    "reset_chunks",
    "reset_constant",
    "reset_linears",
    "same_shape",
    "set_backend",
    "unhalved",
    "use_backend",
    "widened",
]
