"""Modulations that differ over space, from a map of any resolution."""

from collections.abc import Sequence
from typing import Any

import condmod
from condmod_space.spade import Spade
from condmod_space.spatial_norm import SpatialNorm


@condmod.hookimpl
def condmod_modulators() -> Sequence[type[condmod.Component[Any, Any]]]:
    """The modulators of this family."""
    return [Spade, SpatialNorm]
