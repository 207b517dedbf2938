"""What a law needs to know of a component: how to build it, feed it, and what it should give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from condmod.bank import Bank
from condmod.build import SpecLike, configure, create, create_encoder, shares
from condmod.component import Component
from condmod.config import ComponentConfig, ModulatorConfig
from condmod.encoder import Encoder
from condmod.modulator import SublayerModulator
from condmod.registry import Registry
from condmod.site import Condition, Signal, Site

Make = Callable[[int, tuple[int, ...], torch.dtype], Any]


@dataclass(frozen=True, eq=False)
class ModulatorCase:
    """One modulator at one site.

    Attributes:
        spec: what to build.
        site: where.
        reference: naive float64 reference, (state dict, x, condition, *sublayers) -> output,
            written from the paper.
        positions: shapes of positions to try; features are (B, *positions, C) or
            (B, C, *positions).
        condition: makes the same raw condition every time from batch, positions (() for a
            global one) and the model's dtype; needed for every kind but `global`, `aligned`
            and `self`.
        neutral: (module, x, *sublayers) -> what the pass gives at scale 1, shift 0, gate 1;
            x itself by default. Needed where the component normalises or acts around sublayers.
        sublayer: makes the layer that it acts around, for components that read a layer's weight
            or change the width (`Site.out_features`); plain functions by default. The layer may
            change the positions too.
        registry: where to look the spec up.
        name: what the test is called.
    """

    spec: SpecLike
    site: Site
    reference: Callable[..., Tensor]
    positions: Sequence[tuple[int, ...]] = ((), (1,), (2,), (5,), (2, 3), (2, 3, 2))
    condition: Make | None = None
    neutral: Callable[..., Tensor] | None = None
    sublayer: Callable[[], nn.Module] | None = None
    registry: Registry | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """The spec, and which end the channels are at."""
        place = "first" if self.site.channel_dim == 1 else "last"
        return f"{self.label or self.config}-{place}"

    @property
    def config(self) -> ComponentConfig:
        """The validated options."""
        return configure(self.spec, role="modulator", registry=self.registry)

    @property
    def component(self) -> type[Component[Any, Any]]:
        """The class under test."""
        return cast("type[Component[Any, Any]]", self.config.component)

    @property
    def around(self) -> bool:
        """Whether it acts around sublayers."""
        return issubclass(self.component, SublayerModulator)

    def build(
        self, *, seed: int = 0, spec: SpecLike | None = None, site: Site | None = None
    ) -> nn.Module:
        """The module, its parameters drawn under a seed."""
        config = configure(spec or self.spec, role="modulator", registry=self.registry)
        site = site or self.site
        torch.manual_seed(seed)
        if not shares(config, site):
            return create(config, site, registry=self.registry)
        return Alone(Bank(cast("ModulatorConfig", config), {"here": site}))

    def stirred(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module with parameters away from any special start, so that nothing is hidden."""
        return stir(self.build()).to(dtype)

    def features(
        self, batch: int, positions: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Random features."""
        channels = self.site.features
        shape = (
            (batch, channels, *positions)
            if self.site.channel_dim == 1
            else (batch, *positions, channels)
        )
        return _draw(shape, 1).to(dtype)

    def inputs(
        self,
        batch: int = 2,
        positions: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        aligned: bool | None = None,
    ) -> tuple[Tensor, Any]:
        """Random features with a condition of a kind that the component takes.

        Args:
            batch: B.
            positions: of the features; the case's last ones by default.
            dtype: of features and condition.
            aligned: whether the condition has a row per position; by default only where the
                component takes no other.
        """
        where = self.positions[-1] if positions is None else positions
        kinds = self.component.kinds
        place = where if (kinds == {"aligned"} if aligned is None else aligned) else ()
        x = self.features(batch, where, dtype)
        if self.condition is not None:
            return x, here(self.condition(batch, place, dtype))
        if kinds == {"self"}:
            return x, None
        if not kinds & {"global", "aligned"}:
            raise ValueError(f"{self.name} takes {sorted(kinds)}: its case needs `condition`")
        shape = (batch, *place, self.site.condition_dim or 1)
        value = _draw(shape, 2).to(dtype)
        return x, value.movedim(-1, 1) if place and self.site.channel_dim == 1 else value

    def places(self, positions: tuple[int, ...] | None = None) -> list[bool]:
        """Whether the condition is aligned, for each way in which these positions may get it."""
        where = self.positions[-1] if positions is None else positions
        once = [False] if self.component.kinds - {"aligned"} else []
        return [*once, True] if where and self.takes_aligned() else once

    def sublayers(
        self, dtype: torch.dtype = torch.float32
    ) -> tuple[Callable[[Tensor], Tensor], ...]:
        """Fixed sublayers, as many as the component serves; none where it acts on features.

        Args:
            dtype: of their weights, where they have some: that of the features that they read.
        """
        make, device = self.sublayer, torch.get_default_device()
        if make is None:
            return tuple(_sublayer(part) for part in range(self._parts))
        return tuple(_layer(make, part, dtype, device) for part in range(self._parts))

    def output(self, x: Tensor) -> Tensor:
        """Features of the shape and dtype that come out: the sublayer's, else those of x."""
        for sublayer in self.sublayers(x.dtype):
            x = sublayer(x)
        return x

    @cached_property
    def _parts(self) -> int:
        return cast("SublayerModulator[Any, Any]", self.build()).parts if self.around else 0

    def call(self, module: nn.Module, x: Tensor, condition: Any) -> Tensor:
        """The module's forward, around the fixed sublayers where it needs some."""
        return cast(Tensor, module(x, condition, *self.sublayers(x.dtype)))

    def apply(self, module: Any, x: Tensor, modulation: Any) -> Tensor:
        """What forward does after `generate`."""
        if not self.around:
            return cast(Tensor, module.modulate(x, modulation))
        return cast(Tensor, module.around(x, modulation, *self.sublayers(x.dtype)))

    def takes_aligned(self) -> bool:
        """Whether it takes one condition per position."""
        kinds = self.component.kinds
        return "aligned" in kinds or ("raw" in kinds and self.condition is not None)

    def table(
        self, batch: int, positions: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Signal, Tensor]:
        """Features with rows as their condition, and the aligned condition that they spell out."""
        rows = _draw((batch, 3, self.site.condition_dim or 1), 2).to(dtype)
        index = _draw((batch, *positions), 4).mul(9).long().remainder(3)
        spelt = torch.stack([rows[sample][index[sample]] for sample in range(batch)])
        aligned = spelt.movedim(-1, 1) if self.site.channel_dim == 1 else spelt
        return self.features(batch, positions, dtype), Signal(rows, index=index), aligned

    def repeat(self, condition: Any, positions: tuple[int, ...]) -> Any:
        """A global condition as an aligned one with equal rows."""
        rows = repeat(condition, positions)
        first = self.condition is None and self.site.channel_dim == 1
        return rows.movedim(-1, 1) if first else rows


@dataclass(frozen=True, eq=False)
class EncoderCase:
    """One encoder at one width.

    Attributes:
        spec: what to build.
        out_dim: the width asked for; None for the native one.
        signal: makes the same signal every time from batch, positions (() for one per sample)
            and the model's dtype; timesteps keep float32 where the model is narrower. Where it
            is one number per sample, the law of precision gives large ones in its place, unless
            the encoder refuses them.
        reference: naive float64 reference, (state dict, signal) -> output tensor.
        positions: shapes of positions to try beside (); empty where it takes none.
        per_sample: whether it takes one signal per sample, positions ().
        registry: where to look the spec up.
        name: what the test is called.
    """

    spec: SpecLike
    signal: Make
    reference: Callable[..., Tensor]
    out_dim: int | None = None
    positions: Sequence[tuple[int, ...]] = ((1,), (2,), (5,))
    per_sample: bool = True
    registry: Registry | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """The spec and the width."""
        return f"{self.label or self.config}-{self.out_dim or 'native'}"

    @property
    def config(self) -> ComponentConfig:
        """The validated options."""
        return configure(self.spec, role="encoder", registry=self.registry)

    @property
    def component(self) -> type[Encoder[Any]]:
        """The class under test."""
        return cast("type[Encoder[Any]]", self.config.component)

    def build(self, *, seed: int = 0, spec: SpecLike | None = None) -> Encoder[Any]:
        """The module in evaluation mode, its parameters drawn under a seed."""
        torch.manual_seed(seed)
        module = create_encoder(spec or self.spec, self.out_dim, registry=self.registry)
        return module.eval()

    def stirred(self, dtype: torch.dtype = torch.float32) -> Encoder[Any]:
        """The module with parameters away from any special start."""
        return cast("Encoder[Any]", stir(self.build()).to(dtype))

    @property
    def places(self) -> list[tuple[int, ...]]:
        """Every shape of positions to try."""
        return [*([()] if self.per_sample else []), *self.positions]

    def inputs(
        self,
        batch: int = 3,
        positions: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        """A random signal; per sample by default, where it takes such."""
        if positions is None:
            positions = () if self.per_sample else max(self.positions)
        return here(self.signal(batch, positions, dtype))


class Alone(nn.Module):
    """The one modulator of a bank, with what it shares, called as one that shares nothing."""

    def __init__(self, bank: Bank) -> None:
        super().__init__()
        self.bank = bank
        self.parts = getattr(self._own, "parts", 0)
        self.reads = getattr(self._own, "reads", ())

    @property
    def _own(self) -> Any:
        return self.bank[self.bank.names[0]]

    def generate(self, condition: Any) -> Any:
        """The modulation at the bank's one site."""
        return self.bank(condition)[self.bank.names[0]]

    def modulate(self, x: Tensor, modulation: Any) -> Tensor:
        """As the modulator does."""
        return cast(Tensor, self._own.modulate(x, modulation))

    def enter(self, x: Tensor, modulation: Any, sublayer: Any) -> Tensor:
        """As the modulator does."""
        return cast(Tensor, self._own.enter(x, modulation, sublayer))

    def exit(self, x: Tensor, y: Tensor, modulation: Any, sublayer: Any) -> Tensor:
        """As the modulator does."""
        return cast(Tensor, self._own.exit(x, y, modulation, sublayer))

    def around(self, x: Tensor, modulation: Any, *sublayers: Any) -> Tensor:
        """As the modulator does."""
        return cast(Tensor, self._own.around(x, modulation, *sublayers))

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.bank.reset_parameters()

    def forward(self, x: Tensor, condition: Any, *sublayers: Any) -> Tensor:
        """As the modulator does."""
        self._own.match(x, condition)
        modulation = self.generate(condition)
        return (
            self.around(x, modulation, *sublayers) if self.parts else self.modulate(x, modulation)
        )


def repeat(condition: Any, positions: tuple[int, ...]) -> Any:
    """A condition (B, ...) as (B, *positions, ...) with equal rows; `present` stays per sample."""
    if isinstance(condition, Signal):
        return condition._replace(value=repeat(condition.value, positions))
    if isinstance(condition, Mapping):
        return {key: repeat(value, positions) for key, value in condition.items()}
    middle = condition.reshape(len(condition), *[1] * len(positions), *condition.shape[1:])
    return middle.expand(len(condition), *positions, *condition.shape[1:])


def stir(module: nn.Module) -> nn.Module:
    """Move every parameter off its start by seeded noise."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64, device="cpu"
            )
            parameter.add_((0.3 * noise).to(parameter))
    return module


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor in a condition, signal or modulation."""
    if isinstance(tree, Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, Mapping) else tree if tree is not None else ()
    return [leaf for child in children for leaf in tensors(child)]


def passed_on(leaf: Tensor, condition: Any) -> bool:
    """Whether a part of a modulation is the condition as it came, as a map to be resized is."""
    held = leaf.untyped_storage().data_ptr()
    return any(given.untyped_storage().data_ptr() == held for given in tensors(condition))


def convert(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same condition, signal or modulation with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {key: convert(value, change) for key, value in tree.items()}
    parts = [convert(part, change) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


def with_leaves(tree: Any, leaves: Sequence[Tensor]) -> Any:
    """The same tree with other tensors, in the order of `tensors`."""
    left = iter(leaves)
    return convert(tree, lambda _: next(left))


def to_float(tree: Condition | Any, dtype: torch.dtype) -> Any:
    """Floating tensors in another dtype; integers and masks as they are."""
    return convert(tree, lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf)


def _sublayer(part: int) -> Callable[[Tensor], Tensor]:
    def sublayer(h: Tensor) -> Tensor:
        return torch.tanh(h) * (part + 1) + 0.1 * h

    return sublayer


@cache
def _layer(
    make: Callable[[], nn.Module], part: int, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The same layer each time, its weights fixed and bfloat16's, so that every dtype has them."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(part)
        layer = make()
    return layer.requires_grad_(False).to(torch.bfloat16).to(device, dtype)


def here(tree: Any) -> Any:
    """The same condition or signal on torch's default device, where the laws run."""
    return convert(tree, lambda leaf: leaf.to(torch.get_default_device()))


def _draw(shape: tuple[int, ...], seed: int) -> Tensor:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return here(torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu"))  # type: ignore[no-any-return]
