"""How the components of a model start: drawn afresh beside it, which is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from condmod.attaching.patterns import plain_name
from condmod.bank import Bank
from condmod.component import Component
from condmod.encoder import Encoder

_DRAWS = 3  # of two draws of ten million float32 numbers some agree by chance


class Start(NamedTuple):
    """How a parameter starts.

    Attributes:
        value: one draw.
        fixed: where every draw is the same.
    """

    value: Tensor
    fixed: Tensor

    @property
    def is_constant(self) -> bool:
        """Whether no element of it is random."""
        return bool(self.fixed.all())


class Unit(NamedTuple):
    """A component of a model, the outermost where one holds another.

    Attributes:
        name: the component's, or that of its parameters in the state dict of its bank.
        module: a modulator, an encoder, or what the sites of a bank share.
        kind: units of one kind start alike.
        build: makes a fresh one.
    """

    name: str
    module: nn.Module
    kind: Any
    build: Callable[[], nn.Module]


def units(model: nn.Module) -> Iterator[Unit]:
    """Every component of a model, once."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        unit = _unit(name, module)
        if unit is not None:
            inside.update(map(id, unit.module.modules()))
            yield unit


def _unit(name: str, module: nn.Module) -> Unit | None:
    if isinstance(module, Component):
        # not its own class: torch makes subclasses of it (parametrize, FSDP2)
        config, site = module.config, replace(module.site, name="")
        return Unit(name, module, (config, site), lambda: config.component(config, site))
    if isinstance(module, Encoder):
        config, width = module.config, module.out_dim
        return Unit(name, module, (config, width), lambda: config.component(config, width))
    if isinstance(module, Bank) and module.shared is not None:
        sites = tuple(replace(module[site].site, name="") for site in module)
        config = module.config
        path = f"{name}.shared" if name else "shared"
        kind = (config, sites, "shared")
        return Unit(path, module.shared, kind, lambda: config.component.shared(config, sites))
    return None


def starts(model: nn.Module) -> dict[str, Start]:
    """How every parameter of every component starts, by its name in the model.

    Left out are those that it was not built with, as where an adapter library has wrapped a layer.
    """
    made: dict[str, Start] = {}
    drawn: dict[Any, dict[str, Start]] = {}
    for unit in units(model):
        if unit.kind not in drawn:
            drawn[unit.kind] = _draw(unit.build)
        for name, parameter in unit.module.named_parameters():
            start = drawn[unit.kind].get(plain_name(name))
            if start is not None and start.value.shape == parameter.shape:
                made[f"{unit.name}.{name}" if unit.name else name] = start
    return made


def _draw(build: Callable[[], nn.Module]) -> dict[str, Start]:
    """The starts of a fresh component; no random number of the caller's is drawn."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        module: Any = build()
        first = {name: value.detach().clone() for name, value in module.named_parameters()}
        fixed = {name: torch.ones_like(value, dtype=torch.bool) for name, value in first.items()}
        for _ in range(_DRAWS - 1):
            module.reset_parameters()
            for name, value in module.named_parameters():
                fixed[name] &= value.detach() == first[name]
    return {name: Start(first[name], fixed[name]) for name in first}
