"""Gates and side paths beside the features."""

from collections.abc import Sequence
from typing import Any

import condmod
from condmod_gate.squeeze_excite import SqueezeExcite
from condmod_gate.tanh_gate import TanhGate
from condmod_gate.zero_conv import ZeroConv


@condmod.hookimpl
def condmod_modulators() -> Sequence[type[condmod.Component[Any, Any]]]:
    """The modulators of this family."""
    return [SqueezeExcite, TanhGate, ZeroConv]
