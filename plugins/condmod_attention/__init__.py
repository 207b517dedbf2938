"""Attention to tokens: cross-attention, one set or two, and the encoder of tokens."""

from collections.abc import Sequence
from typing import Any

import condmod
from condmod_attention.codecs import CODECS
from condmod_attention.cross_attention import CrossAttention
from condmod_attention.decoupled_attention import DecoupledAttention
from condmod_attention.tokens import Tokens


@condmod.hookimpl
def condmod_modulators() -> Sequence[type[condmod.Modulator[Any, Any]]]:
    """The modulators of this family."""
    return [CrossAttention, DecoupledAttention]


@condmod.hookimpl
def condmod_encoders() -> Sequence[type[condmod.Encoder[Any]]]:
    """The encoders of this family."""
    return [Tokens]


@condmod.hookimpl
def condmod_codecs() -> Sequence[condmod.Codec]:
    """The published layouts of this family."""
    return CODECS
