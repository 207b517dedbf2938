"""The table of the timestep family, each case with a naive float64 reference."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from condmod import Site
from condmod.testing import EncoderCase, ModulatorCase


def times(batch: int, positions: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Continuous times of order one; float32 where the model is narrower."""
    draw = torch.Generator().manual_seed(2)
    time = torch.rand(batch, *positions, generator=draw, dtype=torch.float64)
    return time.to(torch.promote_types(dtype, torch.float32))


def steps(batch: int, positions: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Integer times from 0 to 9."""
    draw = torch.Generator().manual_seed(2)
    return torch.randint(0, 10, (batch, *positions), generator=draw)


def behind(state: Any, h: Tensor, act: Any = nn.functional.silu, prefix: str = "") -> Tensor:
    """The hidden layer and the projection, where the state dict has them."""
    if f"{prefix}hidden.0.weight" in state:
        h = act(h @ state[f"{prefix}hidden.0.weight"].T + state[f"{prefix}hidden.0.bias"])
    if f"{prefix}proj.weight" in state:
        h = h @ state[f"{prefix}proj.weight"].T + state[f"{prefix}proj.bias"]
    return h


def naive_sinusoid(
    dim: int, *, sines_first: bool = False, minus: int = 0, period: float = 1e4, scale: float = 1.0
) -> Any:
    half = dim // 2

    def reference(state: Any, time: Tensor, prefix: str = "") -> Tensor:
        waves = (torch.sin, torch.cos) if sines_first else (torch.cos, torch.sin)
        columns = [
            wave(scale * time.double() * period ** (-i / (half - minus)))
            for wave in waves
            for i in range(half)
        ]
        columns += [torch.zeros_like(columns[0])] * (dim % 2)
        return behind(state, torch.stack(columns, -1), prefix=prefix)

    return reference


def naive_fourier(form: str, *, act: Any = nn.functional.silu, with_input: bool = False) -> Any:
    def reference(state: Any, time: Tensor) -> Tensor:
        time = time.double()[..., None]
        angle = 2 * math.pi * time * state["features.frequencies"]
        if form == "cos_phase":
            parts = [2**0.5 * (angle + state["features.phases"]).cos()]
        else:
            parts = [angle.sin(), angle.cos()] if form == "sin_cos" else [angle.cos(), angle.sin()]
        return behind(state, torch.cat([time, *parts] if with_input else parts, -1), act)

    return reference


def naive_film(site: Site, encode: Any) -> Any:
    def reference(state: Any, x: Tensor, time: Tensor) -> Tensor:
        x = x.movedim(1, -1) if site.channel_dim == 1 else x
        parts = behind(
            {k.removeprefix("inner."): v for k, v in state.items() if k.startswith("inner.")},
            encode(state, time),
        )
        parts = parts.reshape(len(x), *[1] * (x.ndim - parts.ndim), *parts.shape[1:])
        gamma, beta = parts.chunk(2, -1)
        y = gamma * x + beta
        return y.movedim(-1, 1) if site.channel_dim == 1 else y

    return reference


def naive_table(site: Site) -> Any:
    def reference(state: Any, x: Tensor, time: Tensor) -> Tensor:
        x = x.movedim(1, -1) if site.channel_dim == 1 else x
        parts = torch.stack([state["table"][int(step)] for step in time.flatten()])
        parts = parts.reshape(*time.shape, *[1] * (x.ndim - 1 - time.ndim), -1)
        scale, shift = parts.chunk(2, -1)
        y = (1 + scale) * x + shift
        return y.movedim(-1, 1) if site.channel_dim == 1 else y

    return reference


def cases() -> Iterator[EncoderCase | ModulatorCase]:
    for make in (times, steps):
        yield EncoderCase("timestep(dim=8)", make, naive_sinusoid(8), label=make.__name__)
    odd = naive_sinusoid(7, sines_first=True, minus=1, period=10.0, scale=50.0)
    yield EncoderCase(
        "timestep(dim=7, order='sin_cos', endpoint=True, max_period=10., scale=50., nullable=True)",
        times,
        odd,
    )
    yield EncoderCase("timestep(dim=8, hidden=[6], nullable=True)", times, naive_sinusoid(8), 5)
    yield EncoderCase("fourier(dim=8, std=2.)", times, naive_fourier("sin_cos"))
    yield EncoderCase(
        "fourier(dim=6, form='cos_sin', std=1., learned=True, hidden=[5], activation='gelu')",
        times,
        naive_fourier("cos_sin", act=nn.functional.gelu),
    )
    yield EncoderCase(
        "fourier(dim=5, form='cos_phase', std=1., with_input=True, nullable=True)",
        times,
        naive_fourier("cos_phase", with_input=True),
        4,
    )
    for site in (Site(6, name="blocks.0"), Site(6, channel_dim=1, name="blocks.1")):
        where = ((), (1,), (2,), (5,))
        yield ModulatorCase(
            "per_timestep(encoder=timestep(dim=8, hidden=[5]))",
            site,
            naive_film(site, lambda s, t: naive_sinusoid(8)(s, t, "encoder.")),
            positions=where,
            condition=steps,
        )
        yield ModulatorCase(
            "timestep_table(steps=10)", site, naive_table(site), positions=where, condition=steps
        )


CASES = list(cases())
