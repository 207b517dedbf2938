"""Modulations of a layer's weights."""

from collections.abc import Sequence
from typing import Any

import condmod
from condmod_weight.conditional_conv import ConditionalConv
from condmod_weight.conditional_low_rank import ConditionalLowRank
from condmod_weight.hypernetwork import Hypernetwork
from condmod_weight.stylegan2 import StyleGAN2


@condmod.hookimpl
def condmod_modulators() -> Sequence[type[condmod.Component[Any, Any]]]:
    """The modulators of this family."""
    return [StyleGAN2, ConditionalLowRank, Hypernetwork, ConditionalConv]
