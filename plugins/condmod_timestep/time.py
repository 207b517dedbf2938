"""What the encoders of this family share: how a time is read."""

from typing import Any

import torch
from torch import Tensor

import condmod

SHAPES = {1: "one time per sample, (B,),", 2: "per position, (B, T)"}


def read_time(encoder: condmod.Encoder[Any], signal: condmod.Signal) -> Tensor:
    """A time (B,) or (B, T) in float32, or in float64 where it or the encoder is float64.

    Raises:
        ConditionError: no tensor, or a dtype that cannot tell times apart.
        ShapeError: another rank.
    """
    time = encoder.read(signal, SHAPES)
    if time.dtype in {torch.bfloat16, torch.float16}:
        raise condmod.ConditionError(
            f"{encoder.name} takes integer, float32 or float64 times; got {time.dtype}, which has "
            "already rounded them (bfloat16 turns 937 into 936): keep times out of the "
            "conversion to half precision (with FSDP2, cast_forward_inputs=False)"
        )
    if time.dtype == torch.bool or time.is_complex():
        raise condmod.ConditionError(
            f"{encoder.name} takes integer, float32 or float64 times; got {time.dtype}"
        )
    wide = torch.promote_types(torch.float32, encoder.dtype)
    return time.to(torch.promote_types(wide, time.dtype))
