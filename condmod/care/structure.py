"""Which modules stand beside a modulator, as far as a model's structure tells for sure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from condmod.attaching.conditioned import Conditioned
from condmod.attaching.patterns import named_modules
from condmod.attaching.sites import sites_of
from condmod.bank import Bank
from condmod.care.groups import NORMS
from condmod.component import Component
from condmod.encoder import Encoder
from condmod.modulator import Modulator, SublayerModulator


class Spot(NamedTuple):
    """A modulator and what is known to stand beside it.

    Attributes:
        place: what a finding calls it.
        modulator: the modulator.
        placement: "input", "output" or "around", of the modules that it acts on.
        acts_on: these modules; none where they are not known.
        before: what gives it its features, if that is known.
        after: what reads what it gives, if that is known.
    """

    place: str
    modulator: Any
    placement: str
    acts_on: tuple[nn.Module, ...]
    before: nn.Module | None
    after: nn.Module | None


def is_norm(module: nn.Module | None) -> bool:
    """Whether a module is a norm, by its class or, of other libraries, the class's name."""
    return isinstance(module, NORMS) or (
        module is not None
        and not isinstance(module, Component | Encoder)
        and "norm" in type(module).__name__.lower()
        and not any(module.children())
    )


def spots(model: nn.Module) -> Iterator[Spot]:
    """Every modulator beside which something is known to stand."""
    for module in model.modules():
        if isinstance(module, Conditioned):
            yield from _attached(module)
    yield from _in_sequence(model)
    yield from _around(model)


def _attached(conditioned: Conditioned) -> Iterator[Spot]:
    """At the sites of an attachment the model says what a modulator acts on."""
    modules = {**named_modules(conditioned.base), "": conditioned.base}
    modulators = conditioned.bank.modulators()
    beside = _neighbours(conditioned.base, own=False)
    for planned in conditioned.plan:
        name, placement = planned.site.name, planned.placement
        module = modules.get(name)
        if module is None or not any(
            site.slot.attachment == conditioned.name for site in sites_of(module)
        ):
            continue  # detached, or another module has its name
        before, after = beside.get(id(module), (None, None))
        if placement == "output":
            before = ends(module)[1]
        elif placement == "input":
            after = ends(module)[0]
        elif placement != "around":  # on the weight: what stands beside tells nothing
            continue
        yield Spot(name, modulators[name], placement, (module,), before, after)


def _in_sequence(model: nn.Module) -> Iterator[Spot]:
    """In a Sequential, which may be a subclass that hands a condition on."""
    names = {id(module): name for name, module in model.named_modules()}
    for key, (before, after) in _neighbours(model, own=True).items():
        yield Spot(names[key], model.get_submodule(names[key]), "", (), before, after)


def _neighbours(
    model: nn.Module, *, own: bool
) -> dict[int, tuple[nn.Module | None, nn.Module | None]]:
    """What stands before and behind modules in a Sequential: modulators (`own`), or any."""
    found: dict[int, tuple[nn.Module | None, nn.Module | None]] = {}
    for module in model.modules():
        if not isinstance(module, nn.Sequential) or not (own or _is_plain(module)):
            continue
        run: list[nn.Module | None] = [None, *_run(module), None]
        for before, middle, after in zip(run, run[1:], run[2:], strict=False):
            if middle is not None and (isinstance(middle, Modulator) or not own):
                known = found.get(id(middle), (None, None))  # of a Sequential around this one
                found[id(middle)] = (known[0] or before, known[1] or after)
    return found


def ends(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The first and the last of what a module is known to call in turn: a Sequential's."""
    run = list(_run(module)) if isinstance(module, nn.Sequential) and _is_plain(module) else []
    return (run[0], run[-1]) if run else (module, module)


def _run(sequence: nn.Sequential) -> Iterator[nn.Module]:
    """The modules that a Sequential calls in turn, those of Sequentials in it too."""
    for child in sequence:
        if isinstance(child, nn.Sequential) and _is_plain(child) and not sites_of(child):
            yield from _run(child)
        elif type(child) is not nn.Identity:
            yield child


def _is_plain(sequence: nn.Sequential) -> bool:
    own = getattr(type(sequence), "_condmod_base", type(sequence))  # without its sites
    return own.forward is nn.Sequential.forward


def _around(model: nn.Module) -> Iterator[Spot]:
    """A modulator around sublayers, where its parent or its site's name says which they are.

    The parent does where the modulator is the only one in it, and it has just as many other
    modules with parameters as the modulator serves.
    """
    for name, parent in model.named_modules():
        children = dict(parent.named_children())
        alone = [child for child in children.values() if isinstance(child, SublayerModulator)]
        others = [
            child
            for child in children.values()
            if not isinstance(child, Component | Encoder | Bank)
            and not is_norm(child)
            and next(child.parameters(), None) is not None
        ]
        if len(alone) == 1 and len(others) == alone[0].parts:
            yield Spot(_place(name, alone[0]), alone[0], "around", tuple(others), None, None)
        for bank in children.values():
            if isinstance(bank, Bank):
                yield from _named(name, parent, bank)


def _named(name: str, parent: nn.Module, bank: Bank) -> Iterator[Spot]:
    """Sites of a bank that have the dotted name of a module beside it."""
    modules = named_modules(parent)
    for site in bank:
        one, module = bank[site], modules.get(site)
        if isinstance(one, SublayerModulator) and one.parts == 1 and module is not None:
            yield Spot(f"{name}.{site}".strip("."), one, "around", (module,), None, None)


def _place(name: str, modulator: Any) -> str:
    return modulator.site.name or name or str(modulator.name)
