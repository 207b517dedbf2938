"""Measure what each condition does to a model's output, and what every site makes of it."""

from __future__ import annotations

import inspect as signatures
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from condmod.attaching.conditioned import Conditioned
from condmod.attaching.patterns import plain_name
from condmod.care.inspection import Effect, Inspection, PartOfSite
from condmod.component import Component
from condmod.errors import ConditionError, CondmodError
from condmod.functional import Indexed
from condmod.modulator import SublayerModulator
from condmod.site import Signal

_CLOSED = 1e-3  # a gate's factor below which nothing comes through


def inspect(
    model: nn.Module,
    batch: Mapping[str, Any] | Sequence[Any],
    conditions: Sequence[str] | Mapping[str, str | None] = ("condition",),
) -> Inspection:
    """Measure what each condition does to a model's output, and what its sites make of them.

    The model runs in evaluation and is left as it was. A batch of a few dozen samples with
    conditions as they come tells more than one of two.

    Args:
        model: of your own, or what `attach` returned.
        batch: its arguments by name, or in order.
        conditions: the names of the arguments that are conditions; a mapping says of each the name
            of the bool argument that tells which samples have it, or None. An argument that is a
            mapping of signals is one condition for each.

    Raises:
        ConditionError: an argument that the batch lacks, a batch of one sample, or a condition that
            holds no tensor or is equal for all samples.
    """
    model = _unwrapped(model)
    arguments = _bound(model, batch)
    if isinstance(conditions, str):
        raise ConditionError(
            f"conditions are names in a list, or in a mapping with what tells who has them; got "
            f"{conditions!r}: say conditions=[{conditions!r}]"
        )
    presences = conditions if isinstance(conditions, Mapping) else dict.fromkeys(conditions)
    attached = isinstance(model, Conditioned)
    if isinstance(model, Conditioned) and not model.plan.needs_condition:
        presences = {}
    for name in [*presences, *filter(None, presences.values())]:
        if name not in arguments:
            raise ConditionError(
                f"inspect is to look at the condition {name!r}, and the batch has "
                f"{', '.join(arguments)}; name the arguments that are conditions: "
                "inspect(model, batch, conditions=[...])"
            )
    with _evaluation(model), torch.compiler.set_stance("force_eager"):
        with _watched(model) as seen, torch.no_grad():
            output = _output(model, arguments)
        effects = [
            _effect(model, arguments, path, presence, output, attached=attached)
            for argument, presence in presences.items()
            for path in _paths(argument, arguments[argument])
        ]
    return Inspection(tuple(effects), tuple(_parts(seen)))


_Path = tuple[str, ...]


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that was compiled, or spread over devices: its own forward names the arguments."""
    while isinstance(model, OptimizedModule | nn.DataParallel | DistributedDataParallel):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


def _bound(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The arguments of a call by their names."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, Tensor) or not isinstance(batch, Sequence):
        batch = (batch,)
    base = _unwrapped(model.base) if isinstance(model, Conditioned) else model
    names = list(signatures.signature(base.forward).parameters)
    return dict(zip(names, batch, strict=False))


def _paths(argument: str, value: Any) -> list[_Path]:
    """The conditions in an argument: itself, or each signal of a mapping."""
    if isinstance(value, Mapping):
        return [(argument, key) for key in value]
    return [(argument,)]


def _at(arguments: Mapping[str, Any], path: _Path) -> Any:
    value = arguments[path[0]]
    return value if len(path) == 1 else value[path[1]]


def _with(arguments: Mapping[str, Any], path: _Path, value: Any) -> dict[str, Any]:
    """The arguments with another condition."""
    if len(path) == 1:
        return {**arguments, path[0]: value}
    return {**arguments, path[0]: {**arguments[path[0]], path[1]: value}}


def _effect(
    model: nn.Module,
    arguments: dict[str, Any],
    path: _Path,
    presence: str | None,
    output: Tensor,
    *,
    attached: bool,
) -> Effect:
    value, name = _at(arguments, path), path[-1]
    size = float(output.double().square().mean().sqrt()) or 1.0

    def change(others: dict[str, Any]) -> float:
        with torch.no_grad():
            moved = _output(model, others)
        return float((moved.double() - output.double()).square().mean().sqrt()) / size

    if not _leaves(value):
        raise ConditionError(
            f"the condition {name!r} holds no tensor whose samples could be swapped; got "
            f"{type(value).__name__}"
        )
    swapped = _mapped(value, lambda leaf: leaf.roll(1, 0) if leaf.ndim else leaf)
    leaves = zip(_leaves(value), _leaves(swapped), strict=True)
    if all(torch.equal(one, other) for one, other in leaves):
        raise ConditionError(
            f"every sample of the batch has the same condition {name!r}, so nothing tells what it "
            "does; give a batch of two or more with conditions that differ"
        )
    swap = change(_with(arguments, path, swapped))
    drop = None
    if presence is not None:
        drop = change({**arguments, presence: torch.zeros_like(arguments[presence])})
    elif attached or isinstance(value, Signal):
        signal = value if isinstance(value, Signal) else Signal(value)
        first = _leaves(signal.value)[0]
        absent = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        try:
            drop = change(_with(arguments, path, signal._replace(present=absent)))
        except CondmodError:  # it has no null
            drop = None
    return Effect(name, swap, drop, _gradient(model, arguments, path, size))


def _gradient(
    model: nn.Module, arguments: dict[str, Any], path: _Path, size: float
) -> float | None:
    """rms(c)·‖Jᵀv‖/‖y‖, with one random v: as for a random relative change of c."""
    value = _at(arguments, path)
    content = value.value if isinstance(value, Signal) else value
    if not (isinstance(content, Tensor) and content.is_floating_point()):
        return None
    probe = content.detach().clone().requires_grad_()
    changed = value._replace(value=probe) if isinstance(value, Signal) else probe
    with torch.enable_grad():
        y = _output(model, _with(arguments, path, changed))
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(y.shape, generator=generator).to(y)
    if not y.requires_grad:  # the model, or who calls, runs without gradients
        return None
    (slope,) = torch.autograd.grad(y, probe, v, allow_unused=True)
    if slope is None:
        return 0.0
    steepness = float(slope.double().norm()) * float(content.double().square().mean().sqrt())
    return steepness / (size * math.sqrt(y.numel()))


def _output(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The model's output, the first floating tensor of several, a loss only where it is alone."""
    torch.manual_seed(0)  # noise that the model draws is no effect of a condition
    leaves = [leaf for leaf in _leaves(model(**arguments)) if leaf.is_floating_point()]
    if not leaves:
        raise ConditionError("the model gave no floating tensor, so no effect can be measured")
    return next((leaf for leaf in leaves if leaf.ndim), leaves[0])


def _leaves(tree: Any) -> list[Tensor]:
    """Every tensor of an output or a condition."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    elif is_dataclass(tree) and not isinstance(tree, type):
        tree = tuple(vars(tree).values())
    if isinstance(tree, tuple | list):
        return [leaf for part in tree for leaf in _leaves(part)]
    return []


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same condition or Signal with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, Signal):
        return Signal(*(_mapped(part, change) for part in tree))
    if isinstance(tree, tuple | list):
        parts = [_mapped(part, change) for part in tree]
        return parts if isinstance(tree, list) else tuple(parts)
    return tree


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Run in evaluation; every module's mode and the random numbers are as before at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[Component[Any, Any], tuple[str, Any]]]:
    """Note what every modulator generates, with its place; the last one where it does so twice."""
    seen: dict[Component[Any, Any], tuple[str, Any]] = {}

    def watch(name: str, component: Any) -> None:
        own = component.generate

        def generate(condition: Any = None) -> Any:
            modulation = own(condition)
            seen[component] = name, modulation
            return modulation

        component.generate = generate

    places = {
        module: plain_name(name)
        for name, module in model.named_modules()
        if isinstance(module, Component) and not hasattr(module, "inner")
    }
    uses = Counter(component.site.name for component in places)
    components = {
        component: place if uses[component.site.name] > 1 else component.site.name or place
        for component, place in places.items()
    }
    try:
        for component, name in components.items():
            watch(name, component)
        yield seen
    finally:
        for component in components:
            vars(component).pop("generate", None)


def _parts(seen: Mapping[Component[Any, Any], tuple[str, Any]]) -> Iterator[PartOfSite]:
    for component, (site, modulation) in seen.items():
        around = isinstance(component, SublayerModulator) and not component.reads_weight
        pieces = modulation if isinstance(component, SublayerModulator) else (modulation,)
        for number, piece in enumerate(pieces):
            before = f"{number} " if len(pieces) > 1 else ""
            for part, leaf in _named(piece):
                value = leaf.detach().double()
                yield PartOfSite(
                    site,
                    str(component.config),
                    before + part,
                    float(value.mean()),
                    float(value.std(correction=0)),
                    float(value.std(0, correction=0).mean()),
                    float(value.min()),
                    float(value.max()),
                    _closed(component, piece, leaf) if around and part == "gate" else None,
                )


def _closed(component: Any, piece: Any, gate: Tensor) -> float | None:
    """The share of channels of which nothing of a sublayer's output comes through."""
    positions = gate.shape[1:-1] or (4,)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(gate), *positions, gate.shape[-1], generator=generator)
    y = drawn.to(gate.device).movedim(-1, component.site.channel_dim)
    nothing = torch.zeros_like(y)
    try:
        with torch.no_grad():
            through = component.exit(nothing, y, piece, None)
            through = through - component.exit(nothing, nothing, piece, None)
    except CondmodError:  # rows: a table does not fit one position for each row
        return None
    largest = through.abs().movedim(component.site.channel_dim, -1).flatten(0, -2).amax(0)
    return float((largest < _CLOSED).double().mean())


def _named(modulation: Any, before: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every floating leaf of a modulation with its name; of rows their table."""
    leaf = modulation.rows if isinstance(modulation, Indexed) else modulation
    if isinstance(leaf, Tensor):
        if leaf.is_floating_point() and leaf.numel():
            yield before, leaf
        return
    for name, part in zip(leaf._fields, leaf, strict=True):
        yield from _named(part, f"{before} {name}".strip())
