"""Where published checkpoints keep the parameters of this family."""

from collections.abc import Sequence
from typing import Any

from condmod.codec import Codec, Layout, linear, same

SCALE_SHIFT = ("scale", "shift")


def adm(config: Any) -> Sequence[Layout]:
    """A residual block of guided-diffusion: emb_layers, and the norm that opens out_layers."""
    shares = SCALE_SHIFT if config.use_scale_shift_norm else ("shift",)
    norms = [same(f"norm.{leaf}", f"out_layers.0.{leaf}") for leaf in ("weight", "bias")]
    return [*linear({"proj": shares}, {"emb_layers.1": shares}), *norms]


def adaln(projection: str, theirs: tuple[str, ...], norm: str) -> Any:
    """A projection with its rows in the source's order, and the norm's affine where it has one."""

    def layouts(config: Any) -> Sequence[Layout]:
        ours = tuple(config.order.split("_"))
        rows = linear({"proj": ours}, {projection: theirs}, bias=config.bias)
        leaves = {"layer": ("weight", "bias"), "rms": ("weight",)}[config.norm]
        affine = leaves if config.affine else ()
        return [*rows, *(same(f"norm.{leaf}", f"{norm}.{leaf}") for leaf in affine)]

    return layouts


CODECS = [
    Codec("ada_group_norm", "adm", adm, beside=True),
    Codec(
        "ada_group_norm_diffusers",
        "diffusers",
        lambda _: linear({"proj": SCALE_SHIFT}, {"linear": SCALE_SHIFT}),
    ),
    Codec(
        "ada_group_norm_k_diffusion",
        "k_diffusion",
        lambda _: linear({"proj": SCALE_SHIFT}, {"mapper": SCALE_SHIFT}),
    ),
    Codec(
        "adaln",
        "dit",
        adaln("adaLN_modulation.1", ("shift", "scale"), "norm_final"),
        beside=True,
        requires={"norm": "layer"},
    ),
    Codec("adaln", "diffusers", adaln("linear", SCALE_SHIFT, "norm")),
    Codec(
        "hunyuan_shift",
        "diffusers",
        lambda _: [
            *linear({"proj": ("shift",)}, {"linear": ("shift",)}),
            *(same(f"norm.{leaf}", f"norm.{leaf}") for leaf in ("weight", "bias")),
        ],
    ),
    Codec(
        "ada_rms_norm",
        "x_transformers",
        lambda _: linear({"proj": ("scale",)}, {"to_gamma": ("scale",)}, bias=False),
    ),
    Codec(
        "ada_rms_norm",
        "k_diffusion",
        lambda _: linear({"proj": ("scale",)}, {"linear": ("scale",)}, bias=False),
    ),
]
