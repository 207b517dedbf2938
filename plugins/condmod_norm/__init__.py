"""Normalisation whose scale and shift a condition sets."""

from collections.abc import Sequence
from typing import Any

import condmod
from condmod_norm.ace_layer_norm import AceLayerNorm
from condmod_norm.ada_group_norm import AdaGroupNorm
from condmod_norm.ada_group_norm_diffusers import AdaGroupNormDiffusers
from condmod_norm.ada_group_norm_k_diffusion import AdaGroupNormKDiffusion
from condmod_norm.ada_rms_norm import AdaRMSNorm
from condmod_norm.adain import AdaIN
from condmod_norm.adain1d import AdaIN1d
from condmod_norm.adaln import AdaLN
from condmod_norm.biggan_batch_norm import BigGANBatchNorm
from condmod_norm.codecs import CODECS
from condmod_norm.conditional_batch_norm import ConditionalBatchNorm
from condmod_norm.conditional_instance_norm import ConditionalInstanceNorm
from condmod_norm.edm2 import EDM2
from condmod_norm.hunyuan_shift import HunyuanShift
from condmod_norm.modern_batch_norm import ModernBatchNorm


@condmod.hookimpl
def condmod_modulators() -> Sequence[type[condmod.Modulator[Any, Any]]]:
    """The modulators of this family."""
    return [
        AdaGroupNorm,
        AdaGroupNormDiffusers,
        AdaGroupNormKDiffusion,
        AdaLN,
        AdaRMSNorm,
        HunyuanShift,
        AceLayerNorm,
        AdaIN,
        AdaIN1d,
        ConditionalBatchNorm,
        ConditionalInstanceNorm,
        BigGANBatchNorm,
        ModernBatchNorm,
        EDM2,
    ]


@condmod.hookimpl
def condmod_codecs() -> Sequence[condmod.Codec]:
    """The published layouts of this family."""
    return CODECS
