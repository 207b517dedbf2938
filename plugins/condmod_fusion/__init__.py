"""Fusion: encoders of labels, numbers and vectors, several of them as one condition."""

from collections.abc import Sequence
from typing import Any

import condmod
from condmod_fusion.fuse import Fuse
from condmod_fusion.label import Label
from condmod_fusion.multi_condition import MultiCondition
from condmod_fusion.scalar import Scalar
from condmod_fusion.vector import Vector


@condmod.hookimpl
def condmod_encoders() -> Sequence[type[condmod.Encoder[Any]]]:
    """The encoders of this family."""
    return [Label, Scalar, Vector, Fuse]


@condmod.hookimpl
def condmod_modulators() -> Sequence[type[condmod.Modulator[Any, Any]]]:
    """The modulators of this family."""
    return [MultiCondition]
