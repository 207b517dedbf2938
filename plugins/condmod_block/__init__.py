"""Norm, affine and gate around the sublayers of a transformer block, from one condition."""

from collections.abc import Sequence
from typing import Any

import condmod
from condmod_block.adaln_single import AdaLNSingle
from condmod_block.adaln_zero import AdaLNZero
from condmod_block.adaptive_layer_scale import AdaptiveLayerScale
from condmod_block.af3_adaln import Af3AdaLN
from condmod_block.codecs import CODECS
from condmod_block.cogvideox import CogVideoX
from condmod_block.cogview3 import CogView3
from condmod_block.cosmos import Cosmos
from condmod_block.flux2 import Flux2
from condmod_block.lumina import Lumina
from condmod_block.mmdit import MMDiT
from condmod_block.pi05 import Pi05
from condmod_block.sd35 import SD35
from condmod_block.stable_audio import StableAudio
from condmod_block.wan import Wan
from condmod_block.z_image import ZImage


@condmod.hookimpl
def condmod_modulators() -> Sequence[type[condmod.SublayerModulator[Any, Any]]]:
    """The modulators of this family."""
    return [
        AdaLNZero,
        MMDiT,
        Flux2,
        SD35,
        CogView3,
        CogVideoX,
        AdaLNSingle,
        Wan,
        StableAudio,
        Cosmos,
        Lumina,
        ZImage,
        Pi05,
        Af3AdaLN,
        AdaptiveLayerScale,
    ]


@condmod.hookimpl
def condmod_codecs() -> Sequence[condmod.Codec]:
    """The published layouts of this family."""
    return CODECS
