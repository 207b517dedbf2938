"""What is wrong with the conditioning of a model, told before it has cost a training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from condmod.attaching.patterns import plain_name
from condmod.attaching.planning import check_model
from condmod.bank import Bank
from condmod.care.dropping import dropping
from condmod.care.groups import Reason, reasons
from condmod.care.probing import gets_no_gradient, is_normed_twice, is_undone
from condmod.care.starts import Start, starts, units
from condmod.care.structure import Spot, ends, is_norm, spots
from condmod.errors import SiteError

_SHOWN = 3  # places of a finding that a line names
_UNCONDITIONAL = 0.05  # the share of samples that guidance against no condition learns from


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, at one place or at several alike.

    Attributes:
        rule: its name, such as "weight-decay".
        places: modules or parameters, by their names in the model.
        what: what is so.
        mend: what to do.
    """

    rule: str
    places: tuple[str, ...]
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.rule} at {_brief(self.places)}: {self.what}; {self.mend}"


class Findings(list[Finding]):
    """A list that prints one line each."""

    def __str__(self) -> str:
        return "\n".join(str(finding) for finding in self) or "nothing found"

    __repr__ = __str__


def lint(model: nn.Module, optimizer: Any = None, *, fresh: bool = False) -> list[Finding]:
    """Tell what is wrong with the conditioning of a model; nothing is changed, and no data needed.

    Only what is certain is told: from parameters, from the structure where it says which modules
    stand beside a modulator, and from a try of these on made-up features.

    Args:
        model: any model with components of condmod in it, or what `attach` returned.
        optimizer: what is to train it; its weight decay and what it holds are then looked at.
        fresh: say that nothing has been trained or loaded yet, so that every component must be as
            it starts.

    Returns:
        The findings, a list that prints one line each; empty where nothing is wrong.

    Raises:
        SiteError: no model, no optimizer, one that holds no parameter of the model, or one that
            has taken steps where `fresh` says that nothing is trained.
    """
    check_model(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    known = starts(model)
    findings: list[Finding] = [
        *_beside(model),
        *_foreign(model, known, fresh=fresh),
        *_narrow(model),
        *_leaking(model),
    ]
    if optimizer is not None:
        _check_optimizer(optimizer, names, fresh=fresh)
        findings += [
            *_decaying(optimizer, names, reasons(model, known)),
            *_forgotten(model, optimizer),
        ]
    return Findings(findings)


def _beside(model: nn.Module) -> Iterator[Finding]:
    """What stands beside a modulator and does not go with it."""
    banks = {
        id(module[name]): module
        for module in model.modules()
        if isinstance(module, Bank) and module.shared is not None
        for name in module
    }
    dead: dict[str, list[str]] = {}
    undone: dict[tuple[str, str], list[str]] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for spot in spots(model):
        bank, name = banks.get(id(spot.modulator)), spot.modulator.name
        if spot.acts_on and gets_no_gradient(spot, bank):
            dead.setdefault(name, []).append(spot.place)
        if is_norm(spot.after) and is_undone(spot, bank):
            undone.setdefault((name, type(spot.after).__name__), []).append(spot.place)
        for norm in _norms_before(spot):
            if is_normed_twice(spot, bank, norm):
                twice.setdefault((name, type(norm).__name__), []).append(spot.place)
    for name, places in dead.items():
        yield Finding(
            "double-zero",
            _plain(places),
            f"no gradient reaches {name}, nor what it acts on: both are shut by zeros, and stay so",
            "let one of them start open: a last layer that is not 0, or init='identity'",
        )
    for (name, kind), places in undone.items():
        yield Finding(
            "undone-by-norm",
            _plain(places),
            f"the {kind} directly behind {name} takes its modulation out again, where it is one "
            "per sample",
            "modulate behind the norm",
        )
    for (name, kind), places in twice.items():
        yield Finding(
            "normed-twice",
            _plain(places),
            f"{name} norms by itself, and the {kind} beside it norms the same features too: the "
            "mechanism means one norm",
            "take that norm away, or a modulator without one, such as film",
        )


def _norms_before(spot: Spot) -> list[nn.Module]:
    """The affine norms that the features go through before the modulator's pass, or behind it."""
    beside = (
        [ends(module)[0] for module in spot.acts_on]
        if spot.placement == "around"
        else [spot.before]
    )
    return [
        norm
        for norm in beside
        if norm is not None and is_norm(norm) and next(norm.parameters(), None) is not None
    ]


def _foreign(model: nn.Module, known: dict[str, Start], *, fresh: bool) -> Iterator[Finding]:
    """What is not as it starts: where nothing is trained, or where training cannot have done it."""
    changed, wiped = [], []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        held = {key: f"{name}.{key}".strip(".") for key in own}
        changed += [
            held[key]
            for key, parameter in own.items()
            if held[key] in known and _has_left(parameter, known[held[key]])
        ]
        bias = known.get(held.get("bias", ""))
        if bias is None or held.get("weight") not in changed:
            continue
        zero = bias.fixed & (bias.value == 0)
        stays = bool(zero.any()) and not own["bias"].detach().cpu()[zero].any()
        trains = own["weight"].requires_grad and own["bias"].requires_grad
        if stays and trains:
            wiped.append(held["weight"])
    mend = "call reset_parameters() of the component after model.apply(init)"
    if fresh and changed:
        what = "the component starts it at a constant, which it is not any more"
        yield Finding("foreign-start", _plain(changed), what, mend)
    elif wiped:
        what = (
            "it has left the constant that the component starts it at, and the bias beside it is "
            "still 0 as at the start: training moves both, a blanket init does not"
        )
        yield Finding("foreign-start", _plain(wiped), what, mend)


def _has_left(parameter: nn.Parameter, start: Start) -> bool:
    if parameter.is_meta or hasattr(parameter, "placements"):  # no values, or a part of them
        return False
    value = parameter.detach().cpu()
    return bool(((value != start.value.to(value.dtype)) & start.fixed).any())


def _narrow(model: nn.Module) -> Iterator[Finding]:
    """Parameters that train in half precision."""
    found: dict[torch.dtype, list[str]] = {}
    for name, parameter in _trained(model):
        if parameter.dtype in (torch.bfloat16, torch.float16):
            found.setdefault(parameter.dtype, []).append(name)
    for dtype, places in found.items():
        step = "1/256" if dtype == torch.bfloat16 else "1/2048"
        yield Finding(
            "half-precision",
            _plain(places),
            f"it trains in {str(dtype).removeprefix('torch.')}, where steps below {step} of a "
            "value are lost",
            "keep it in float32 and run the model under autocast",
        )


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of components that are in training mode and not frozen."""
    return [
        (f"{unit.name}.{name}".strip("."), parameter)
        for unit in units(model)
        if unit.module.training
        for name, parameter in unit.module.named_parameters()
        if parameter.requires_grad
    ]


def _leaking(model: nn.Module) -> Iterator[Finding]:
    """Signals that are dropped, and hardly ever together."""
    found = dropping(model)
    drops = any(found.rates.values())
    if found.jointly or not drops or len(found.rates) < 2 or found.together >= _UNCONDITIONAL:
        return
    rates = sorted(set(found.rates.values()))
    spread = " and ".join(f"{rate:g}" for rate in (rates[0], rates[-1])[: len(rates)])
    yield Finding(
        "leaking-drop",
        _plain(found.rates),
        f"they are dropped by several draws, at {spread}, so that {100 * found.together:.2g}% of "
        "the samples lose all of them: guidance against no condition still sees the others",
        "drop them by one draw: one encoder fuse(inputs={...}, drop=0.1) for the whole model",
    )


def _check_optimizer(optimizer: Any, names: dict[int, str], *, fresh: bool) -> None:
    """Refuse what is no optimizer of the model.

    Raises:
        SiteError: it is none, or has taken steps where nothing is said to be trained.
    """
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise SiteError(
            f"lint(model, optimizer) takes an optimizer with param_groups; got {optimizer!r:.80}"
        )
    held = [parameter for group in groups for parameter in group["params"]]
    if not any(id(parameter) in names for parameter in held):
        raise SiteError(
            "the optimizer holds no parameter of this model: it was made for another, or before "
            "this one was copied; make it from condmod.parameter_groups(model)"
        )
    steps = [optimizer.state.get(parameter, {}).get("step", 0) for parameter in held]
    if fresh and any(float(step) > 0 for step in steps):
        raise SiteError(
            "fresh=True says that nothing is trained yet, and the optimizer has taken steps; "
            "leave fresh out"
        )


_PULLED: dict[Reason, str] = {
    "start": "it starts at a constant, and decay holds it at 0 or pulls it off",
    "null": "it is a learned null, and decay pulls it to zeros, which are no absence",
    "table": "it is a table or a factor, and decay pulls at it where no sample uses it, too",
}


def _decaying(optimizer: Any, names: dict[int, str], why: dict[str, Reason]) -> Iterator[Finding]:
    """Weight decay on what it does not suit."""
    found: dict[tuple[float, Reason], list[str]] = {}
    for group in optimizer.param_groups:
        decay = float(group.get("weight_decay") or 0.0)
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            reason = why.get(name)
            if decay and reason in _PULLED:
                found.setdefault((decay, reason), []).append(name)
    for (decay, reason), places in found.items():
        yield Finding(
            "weight-decay",
            _plain(places),
            f"weight_decay={decay:g}: {_PULLED[reason]}",
            "make the optimizer from condmod.parameter_groups(model)",
        )


def _forgotten(model: nn.Module, optimizer: Any) -> Iterator[Finding]:
    """Parameters of components that the optimizer does not hold."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    places = [name for name, parameter in _trained(model) if id(parameter) not in held]
    if places:
        yield Finding(
            "not-trained",
            _plain(places),
            "it requires a gradient, and the optimizer does not hold it",
            "make the optimizer after attaching, from condmod.parameter_groups(model)",
        )


def _plain(names: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(plain_name(name) for name in names))


def _brief(places: tuple[str, ...]) -> str:
    """Places that differ in their numbers as one, and no more than a line holds."""
    alike: dict[str, list[str]] = {}
    for place in places:
        alike.setdefault(re.sub(r"(?<![^./])\d+(?![^./])", "*", place), []).append(place)
    shown = [
        f"{shape} ({len(same)})" if len(same) > 1 else same[0] for shape, same in alike.items()
    ]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
