"""Where published checkpoints keep the parameters of this family."""

from collections.abc import Sequence
from typing import Any

from condmod.codec import Codec, Layout, linear, same

SSG = ("shift", "scale", "gate")


def shares(parts: int) -> tuple[str, ...]:
    """Shift, scale and gate of each part in turn."""
    return tuple(f"{name} {part}" for part in range(parts) for name in SSG)


def rows(component: str, source: str, module: str, parts: int | None = None) -> Codec:
    """One projection whose rows both keep in the same order."""

    def layout(config: Any) -> Sequence[Layout]:
        order = shares(config.parts if parts is None else parts)
        return linear({"proj": order}, {module: order})

    return Codec(component, source, layout)


def table(component: str, source: str, trunk: str) -> Codec:
    """A table per block, and one trunk for all."""

    def shared(config: Any) -> Sequence[Layout]:
        order = shares(getattr(config, "parts", 2))
        return linear({"proj": order}, {trunk: order})

    return Codec(component, source, lambda _: [same("table", "scale_shift_table")], shared=shared)


def cogvideox(_: Any) -> Sequence[Layout]:
    """diffusers' CogVideoXLayerNormZero: one projection for both streams, and their norm."""
    order = shares(2)
    norms = [same(f"norm.{leaf}", f"norm.{leaf}") for leaf in ("weight", "bias")]
    return [*linear({"proj": order}, {"linear": order}), *norms]


def lumina(_: Any) -> Sequence[Layout]:
    """A block of Lumina 2 in diffusers."""
    order = ("scale 0", "gate 0", "scale 1", "gate 1")
    norms = {"attention_norm1": "norm1.norm", "attention_norm2": "norm2"}
    norms |= {name: name for name in ("ffn_norm1", "ffn_norm2")}
    weights = [same(f"norms.{ours}.weight", f"{theirs}.weight") for ours, theirs in norms.items()]
    return [*linear({"proj": order}, {"norm1.linear": order}), *weights]


CODECS = [
    rows("adaln_zero", "dit", "adaLN_modulation.1"),
    rows("adaln_zero", "diffusers", "linear"),
    rows("mmdit", "diffusers", "linear"),
    rows("mmdit", "flux", "lin"),
    rows("mmdit", "sd3", "adaLN_modulation.1"),
    rows("sd35", "diffusers", "linear", 3),
    rows("cogview3", "diffusers", "linear", 4),
    Codec("cogvideox", "diffusers", cogvideox),
    Codec("lumina", "diffusers", lumina, requires={"parts": 2}),
    table("adaln_single", "pixart", "t_block.1"),
    table("adaln_single", "diffusers", "adaln_single.linear"),
    table("wan", "diffusers", "condition_embedder.time_proj"),
]
