"""Normalisation whose scale and shift a condition sets."""

from collections.abc import Sequence
from typing import Any

import condmod
from condmod_norm.ada_group_norm import AdaGroupNorm
from condmod_norm.adaln_zero import AdaLNZero


@condmod.hookimpl
def condmod_modulators() -> Sequence[
    type[condmod.Modulator[Any, Any]] | type[condmod.SublayerModulator[Any, Any]]
]:
    """The modulators of this family."""
    return [AdaLNZero, AdaGroupNorm]
