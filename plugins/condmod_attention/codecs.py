"""Where published checkpoints keep the parameters of this family."""

from collections.abc import Sequence
from typing import Any

from condmod.codec import Codec, Layout, same

ASKING = {"query": "to_q", "key": "to_k", "value": "to_v"}
IMAGE = {"key_image": "processor.to_k_ip.0", "value_image": "processor.to_v_ip.0"}


def attention(config: Any) -> Sequence[Layout]:
    """An Attention of diffusers, which has no norm and no null."""
    leaves = ("weight", "bias") if config.bias else ("weight",)
    asking = [
        same(f"{ours}.{leaf}", f"{to}.{leaf}") for leaf in leaves for ours, to in ASKING.items()
    ]
    return [*asking, *(same(f"out.{leaf}", f"to_out.0.{leaf}") for leaf in ("weight", "bias"))]


def ip_adapter(config: Any) -> Sequence[Layout]:
    """The same with an IPAdapterAttnProcessor of one picture."""
    image = [same(f"{ours}.weight", f"{theirs}.weight") for ours, theirs in IMAGE.items()]
    return [*attention(config), *image]


CODECS = [
    Codec("cross_attention", "diffusers", attention, requires={"norm": "none", "null": False}),
    Codec("decoupled_attention", "diffusers", ip_adapter, requires={"norm": "none"}),
]
