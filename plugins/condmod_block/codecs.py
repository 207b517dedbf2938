"""Where published checkpoints keep the parameters of this family."""

from collections.abc import Sequence
from typing import Any

from condmod.codec import Codec, Layout, linear, same

SSG = ("shift", "scale", "gate")


def shares(parts: int) -> tuple[str, ...]:
    """Shift, scale and gate of each part in turn."""
    return tuple(f"{name} {part}" for part in range(parts) for name in SSG)


def rows(
    component: str,
    source: str,
    module: str,
    parts: int | None = None,
    *,
    beside: bool = False,
    **requires: Any,
) -> Codec:
    """One projection whose rows both keep in the same order."""

    def layout(config: Any) -> Sequence[Layout]:
        order = shares(config.parts if parts is None else parts)
        return linear({"proj": order}, {module: order})

    return Codec(component, source, layout, beside=beside, requires=requires)


def table(component: str, source: str, trunk: str) -> Codec:
    """A table per block, and one trunk for all."""

    def shared(config: Any) -> Sequence[Layout]:
        order = shares(getattr(config, "parts", 2))
        return linear({"proj": order}, {trunk: order})

    fixed = {"norm": "layer"} if source == "pixart" else {}
    tables = [same("table", "scale_shift_table")]
    return Codec(component, source, lambda _: tables, shared=shared, requires=fixed)


def cogvideox(_: Any) -> Sequence[Layout]:
    """diffusers' CogVideoXLayerNormZero: one projection for both streams, and their norm."""
    order = shares(2)
    norms = [same(f"norm.{leaf}", f"norm.{leaf}") for leaf in ("weight", "bias")]
    return [*linear({"proj": order}, {"linear": order}), *norms]


def two_norms(projection: str, **renamed: str) -> Any:
    """A block of Lumina 2 or Z-Image: one projection, and a norm on both sides of each sublayer."""
    order = ("scale 0", "gate 0", "scale 1", "gate 1")
    norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
    return lambda _: [
        *linear({"proj": order}, {projection: order}),
        *(same(f"norms.{name}.weight", f"{renamed.get(name, name)}.weight") for name in norms),
    ]


def stable_audio(_: Any) -> Sequence[Layout]:
    """A block of stable-audio-tools."""
    return [
        same("table", "to_scale_shift_gate"),
        same("attention_norm.weight", "pre_norm.gamma"),
        same("feed_forward_norm.weight", "ff_norm.gamma"),
    ]


def stable_audio_trunk(_: Any) -> Sequence[Layout]:
    """What the blocks of stable-audio-tools share."""
    return [
        same(f"{ours}.{leaf}", f"global_cond_embedder.{number}.{leaf}")
        for ours, number in (("hidden", 0), ("proj", 2))
        for leaf in ("weight", "bias")
    ]


CODECS = [
    rows("adaln_zero", "dit", "adaLN_modulation.1", beside=True, gate="linear"),
    rows("adaln_zero", "diffusers", "linear", gate="linear"),
    rows("mmdit", "diffusers", "linear"),
    rows("mmdit", "flux", "lin"),
    rows("mmdit", "sd3", "adaLN_modulation.1", beside=True),
    rows("sd35", "diffusers", "linear", 3),
    rows("cogview3", "diffusers", "linear", 4),
    Codec("cogvideox", "diffusers", cogvideox),
    Codec(
        "lumina",
        "diffusers",
        two_norms("norm1.linear", attention_norm1="norm1.norm", attention_norm2="norm2"),
        beside=True,
        requires={"parts": 2},
    ),
    Codec(
        "lumina",
        "lumina",
        two_norms("adaLN_modulation.1"),
        beside=True,
        requires={"parts": 2},
    ),
    Codec(
        "z_image",
        "diffusers",
        two_norms("adaLN_modulation.0"),
        beside=True,
        requires={"parts": 2},
    ),
    Codec("stable_audio", "stable_audio_tools", stable_audio, shared=stable_audio_trunk),
    table("adaln_single", "pixart", "t_block.1"),
    table("adaln_single", "diffusers", "adaln_single.linear"),
    table("wan", "diffusers", "condition_embedder.time_proj"),
]
