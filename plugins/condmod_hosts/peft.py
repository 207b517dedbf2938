"""Layers of peft: what LoRA puts in the place of a model's own."""

from collections.abc import Mapping
from operator import attrgetter

from condmod import Layer
from condmod_hosts._refusals import output_alone

_LORA = "peft.tuners.lora.layer"
_WIDE = attrgetter("out_features")
_NARROW = attrgetter("in_features")
_CONV = Layer(_WIDE, _NARROW, channel_dim=1)

LAYERS: Mapping[str, Layer] = {
    f"{_LORA}.Linear": Layer(_WIDE, _NARROW),
    f"{_LORA}.Embedding": Layer(_WIDE, refuses=output_alone("ids")),
    f"{_LORA}.Conv1d": _CONV,
    f"{_LORA}.Conv2d": _CONV,
    f"{_LORA}.Conv3d": _CONV,
}
