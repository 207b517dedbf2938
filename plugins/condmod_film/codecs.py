"""Where published checkpoints keep the parameters of this family."""

from collections.abc import Sequence
from typing import Any

from condmod.codec import Codec, Layout, linear, same

SCALE_SHIFT = ("scale", "shift")


def dense(source: str) -> Codec:
    """DenseFiLM, in EDGE and in Audio2Photoreal."""
    return Codec(
        "dense_film",
        source,
        lambda _: linear({"proj": SCALE_SHIFT}, {"block.1": SCALE_SHIFT}),
        requires={"scale": "one_plus", "hidden": ()},
    )


def decoder(_: Any) -> Sequence[Layout]:
    """ethanjperez/film's generator: one Linear for all blocks, [γ, β] of each in turn."""
    return linear({"proj": SCALE_SHIFT}, {"decoder_linear": SCALE_SHIFT})


def diffusion_policy(config: Any) -> Sequence[Layout]:
    """The condition encoder of a residual block, in Diffusion Policy and LeRobot."""
    shares = SCALE_SHIFT if config.cond_predict_scale else ("shift",)
    return linear({"proj": shares}, {"cond_encoder.1": shares})


def statistics(_: Any) -> Sequence[Layout]:
    """The batch norm of a block of ethanjperez/film."""
    leaves = ("running_mean", "running_var", "num_batches_tracked")
    return [same(f"norm.{leaf}", f"bn1.{leaf}") for leaf in leaves]


CODECS = [
    Codec(
        "film",
        "textbook",
        lambda _: linear({"proj": SCALE_SHIFT}, {"fc_gamma": ("scale",), "fc_beta": ("shift",)}),
        requires={"scale": "raw", "hidden": ()},
    ),
    Codec("film", "film", joined=decoder, requires={"scale": "one_plus", "hidden": ()}),
    Codec("film_block", "film", statistics, joined=decoder, requires={"scale": "one_plus"}),
    dense("edge"),
    dense("audio2photoreal"),
    Codec("diffusion_policy_film", "diffusion_policy", diffusion_policy, beside=True),
    Codec(
        "t5_film",
        "diffusers",
        lambda _: [
            *linear({"proj": SCALE_SHIFT}, {"film.scale_bias": SCALE_SHIFT}, bias=False),
            same("norm.weight", "layer_norm.weight"),
        ],
        beside=True,
    ),
]
