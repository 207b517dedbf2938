"""The table of the fusion family, each case with a naive float64 reference."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from condmod import Signal, Site
from condmod.testing import EncoderCase, ModulatorCase

INPUTS = (
    "inputs={'time': timestep(dim=6), 'label': label(classes=10, dim=5, nullable=True), "
    "'text': vector(features=7, dim=4, nullable=True)}"
)
FUSIONS = [
    f"fuse({INPUTS}, dim=8)",
    f"fuse({INPUTS}, dim=8, hidden=[6])",
    f"fuse({INPUTS}, dim=8, mode='concat')",
    f"fuse({INPUTS}, dim=8, mode='concat', hidden=[])",
    f"fuse({INPUTS}, dim=3, mode='gated', drop=0.3)",
]
SINGLE = [
    "label(classes=10, dim=5, nullable=True)",
    "scalar(dim=5, mean=100., std=20., hidden=[4], nullable=True)",
    "vector(features=7, dim=5, hidden=[4], nullable=True)",
]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(batch: int, positions: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (draw(1, batch, *positions) * 10).long()


def numbers(batch: int, positions: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (draw(2, batch, *positions) * 200).to(torch.promote_types(dtype, torch.float32))


def vectors(batch: int, positions: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return draw(3, batch, *positions, 7).to(dtype)


def masked(batch: int, positions: tuple[int, ...], dtype: torch.dtype) -> Any:
    value = vectors(batch, positions, dtype)
    if not positions:
        return value
    mask = draw(4, batch, *positions) < 0.7
    return Signal(value, mask=mask)


def mapping(batch: int, positions: tuple[int, ...], dtype: torch.dtype) -> Any:
    """A time, and a label and a text that are absent by turns."""
    present = torch.arange(batch) % 2 == 0
    return {
        "label": Signal(labels(batch, positions, dtype), present=present),
        "time": (draw(5, batch, *positions) * 10).long(),
        "text": Signal(vectors(batch, positions, dtype), present=~present),
    }


def linear(state: Any, name: str, h: Tensor) -> Tensor:
    return h @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def naive_label(state: Any, label: Tensor) -> Tensor:
    return torch.stack([state["table"][int(y)] for y in label.flatten()]).reshape(*label.shape, -1)


def naive_scalar(state: Any, value: Tensor) -> Tensor:
    unit = (value.double()[..., None] - 100) / 20
    return linear(state, "proj", nn.functional.silu(linear(state, "hidden.0", unit)))


def naive_vector(state: Any, signal: Any) -> Tensor:
    value = (signal.value if isinstance(signal, Signal) else signal).double()
    return linear(state, "proj", nn.functional.silu(linear(state, "hidden.0", value)))


def naive_fuse(mode: str, hidden: bool = False) -> Any:
    """Inputs as in INPUTS: label, text and a sinusoid of 6 without a projection but in a sum."""

    def reference(state: Any, given: Any) -> Tensor:
        label, present = given["label"].value, given["label"].present
        text, column = given["text"].value, present.reshape(-1, *[1] * label.ndim)
        parts = {
            "label": torch.where(
                column, state["inputs.label.table"][label], state["inputs.label.null"]
            ),
            "text": torch.where(
                column, state["inputs.text.null"], linear(state, "inputs.text.proj", text)
            ),
        }
        angle = given["time"].double()[..., None] * 1e4 ** (-torch.arange(3).double() / 3)
        time = torch.cat([angle.cos(), angle.sin()], -1)
        parts["time"] = linear(state, "inputs.time.proj", time) if mode == "sum" else time
        together = torch.cat([parts[name] for name in ("label", "text", "time")], -1)
        if mode == "sum":
            fused = parts["label"] + parts["text"] + parts["time"]
        elif mode == "concat":
            fused = together
        else:
            gates = torch.sigmoid(together @ state["gates.weight"].T).chunk(3, -1)
            fused = sum(
                gate * torch.tanh(linear(state, f"values.{name}", parts[name]))
                for gate, name in zip(gates, ("label", "text", "time"), strict=True)
            )
        if hidden:
            fused = nn.functional.silu(linear(state, "hidden.0", fused))
        return linear(state, "proj", fused) if hidden or mode == "concat" else fused

    return reference


def naive_multi_condition(site: Site) -> Any:
    def reference(state: Any, x: Tensor, given: Any) -> Tensor:
        x = x.movedim(1, -1) if site.channel_dim == 1 else x
        encoding = {key.removeprefix("encoder."): value for key, value in state.items()}
        parts = linear(state, "inner.proj", nn.functional.mish(naive_fuse("sum")(encoding, given)))
        parts = parts.reshape(len(x), *[1] * (x.ndim - parts.ndim), *parts.shape[1:])
        scale, shift = parts.chunk(2, -1)
        y = (1 + scale) * x + shift
        return y.movedim(-1, 1) if site.channel_dim == 1 else y

    return reference


def cases() -> Iterator[EncoderCase | ModulatorCase]:
    yield EncoderCase(SINGLE[0], labels, naive_label)
    yield EncoderCase(SINGLE[0], labels, naive_label, 9)
    yield EncoderCase(SINGLE[1], numbers, naive_scalar)
    yield EncoderCase(SINGLE[2], vectors, naive_vector)
    yield EncoderCase(SINGLE[2], masked, naive_vector, 9, label="masked vector")
    yield EncoderCase(FUSIONS[0], mapping, naive_fuse("sum"), label="sum")
    yield EncoderCase(FUSIONS[1], mapping, naive_fuse("sum", hidden=True), label="early")
    yield EncoderCase(FUSIONS[2], mapping, naive_fuse("concat", hidden=True), 9, label="concat")
    yield EncoderCase(FUSIONS[3], mapping, naive_fuse("concat"), label="concat linear")
    yield EncoderCase(FUSIONS[4], mapping, naive_fuse("gated"), label="gated")
    for site in (Site(6, name="blocks.0"), Site(6, channel_dim=1, name="blocks.1")):
        yield ModulatorCase(
            f"multi_condition(encoder={FUSIONS[0]})",
            site,
            naive_multi_condition(site),
            positions=((), (1,), (2,), (5,)),
            condition=mapping,
            label="multi_condition",
        )


CASES = list(cases())
