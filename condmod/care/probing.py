"""What can be proved of a modulator and what stands beside it, on copies and made-up features."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from condmod.attaching.attach import detach
from condmod.attaching.sites import tensors
from condmod.bank import Bank
from condmod.care.structure import Spot
from condmod.modulator import Modulator
from condmod.probe import condition_for

_SIDES = {1: ((6, 6), (6,), (4, 4, 4), ()), -1: ((6,), (4, 4), ())}  # positions to try, by end
_BATCH = 2
_EPS = 1e-2  # of a spread of 1; the eps of norms alone changes less


class Unknown(Exception):  # noqa: N818  no error: the question has no answer here
    """What a spot's modules do cannot be tried: they take more than features, for one."""


def gets_no_gradient(spot: Spot, bank: Bank | None) -> bool:
    """Whether neither the modulation nor the modules that it acts on get any gradient.

    Of several modules around which a modulator acts, it is enough that one gets none.

    Args:
        spot: with the modules that it acts on.
        bank: what generates for the modulator, where its sites share parameters.
    """
    return any(
        _may_give_zero(module) and _is_dead(spot, bank, part, module)
        for part, module in enumerate(spot.acts_on)
    )


def is_undone(spot: Spot, bank: Bank | None) -> bool:
    """Whether the norm behind a modulator gives the same whatever its modulation is."""
    if not isinstance(spot.modulator, Modulator):
        return False
    with _trying(spot.modulator):
        modulator, generate = _generator(spot.modulator, bank)
        norm = _bare_copy(spot.after).train()

        def outputs(x: Tensor) -> tuple[Tensor, ...]:
            made = generate(x)
            shifted = [modulator.modulate(x, _remade(made, draw)) for draw in (_low, _high)]
            return (*shifted, *map(norm, shifted))

        one, other, normed, normed_other = _first(modulator, outputs)
        return _differs(one, other) and not _differs(normed, normed_other)
    return False


def is_normed_twice(spot: Spot, bank: Bank | None, norm: nn.Module) -> bool:
    """Whether the modulator gives the same for normed features, at weight 1, as without."""
    with _trying(spot.modulator):
        modulator, generate = _generator(spot.modulator, bank)
        modulator.train()
        before = _bare_copy(norm).train()
        for name, parameter in before.named_parameters():
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)

        def outputs(x: Tensor) -> tuple[Tensor, ...]:
            x = 3 * x + 1
            made = _remade(generate(x), _low)

            def act(h: Tensor) -> Tensor:
                if isinstance(modulator, Modulator):
                    return modulator.modulate(h, made)
                entered: Tensor = modulator.enter(h, made[0], None)
                return entered

            return act(x), act(before(x))

        return not _differs(*_first(modulator, outputs))
    return False


@contextmanager
def _trying(modulator: nn.Module) -> Iterator[None]:
    """What cannot be tried ends the block, and random numbers are as they were before it."""
    own = next(modulator.parameters(), torch.empty(0))
    cards = [own.device] if own.is_cuda else []
    compiles = "torch._dynamo" in sys.modules  # which takes long to import
    eager = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
    with torch.random.fork_rng(cards), eager:
        torch.default_generator.manual_seed(0)
        try:
            yield
        except Unknown:
            return


def _bare_copy(module: Any) -> Any:
    """A copy in float32 and evaluation mode, without hooks and sites."""
    if any(hasattr(parameter, "placements") for parameter in module.parameters()):
        raise Unknown  # sharded: a try of it would wait for other processes
    try:
        copied = copy.deepcopy(module)
        detach(copied)
        for inner in copied.modules():
            inner._forward_hooks.clear()
            inner._forward_pre_hooks.clear()
        return copied.float().eval()
    except Exception as error:  # of any library
        raise Unknown from error


def _generator(modulator: Any, bank: Bank | None) -> tuple[Any, Callable[[Tensor], Any]]:
    """A copy of the modulator, and what generates its modulation for features."""
    if bank is None:
        copied = _bare_copy(modulator)
        inner = copied
        while hasattr(inner, "inner"):  # one that owns an encoder
            inner = inner.inner
        return inner, lambda x: inner.generate(_condition(inner, x))
    name = next(name for name in bank if bank[name] is modulator)
    together = _bare_copy(bank)
    return together[name], lambda x: together(_condition(together[name], x))[name]


def _condition(modulator: Any, x: Tensor) -> Any:
    return condition_for(modulator, x, lambda shape: _random(shape, x.device))


def _first(modulator: Any, outputs: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What comes out for features of the first rank that works.

    Raises:
        Unknown: none does.
    """
    own = next(modulator.parameters(), torch.empty(0))
    features, dim = modulator.site.features, modulator.site.channel_dim
    for sides in _SIDES[dim]:
        shape = (_BATCH, features, *sides) if dim == 1 else (_BATCH, *sides, features)
        try:
            made = outputs(_random(shape, own.device))
        except Exception:  # noqa: BLE001, S112  of any library; another rank may do
            continue
        if all(isinstance(value, Tensor) for value in made):
            return made
    raise Unknown


def _is_dead(spot: Spot, bank: Bank | None, part: int, module: nn.Module) -> bool:
    """Whether no gradient reaches the modulation of one part, nor its module."""
    with _trying(spot.modulator), torch.enable_grad():
        modulator, generate = _generator(spot.modulator, bank)
        copied = _bare_copy(module)
        both = nn.ModuleList([copied, modulator])  # which may hold gates of its own
        trains = [parameter for parameter in both.parameters() if parameter.requires_grad]

        def gradients(x: Tensor) -> tuple[Tensor, ...]:
            made = generate(x)
            made = made[part] if spot.placement == "around" else made
            leaves = [leaf.detach().requires_grad_() for leaf in tensors(made)]
            rest = iter(leaves)
            own = _remade(made, lambda _: next(rest))
            if spot.placement == "around":
                sublayer = copied if modulator.reads_weight else None
                entered = modulator.enter(x, own, sublayer)
                y = modulator.exit(x, copied(entered), own, sublayer)
            elif spot.placement == "output":
                y = modulator.modulate(copied(x), own)
            else:
                y = copied(modulator.modulate(x, own))
            wanted = [*leaves, *trains]
            weighted = (y * _random(tuple(y.shape), y.device)).sum()
            found = torch.autograd.grad(weighted, wanted, allow_unused=True)
            return tuple(
                torch.zeros_like(want) if grad is None else grad
                for grad, want in zip(found, wanted, strict=True)
            )

        return not any(bool(grad.any()) for grad in _first(modulator, gradients))
    return False


def _may_give_zero(module: nn.Module) -> bool:
    """Whether one of its weights is all zero, without which its output is not."""
    return any(
        parameter.ndim > 1 and not parameter.is_meta and not parameter.any()
        for parameter in module.parameters()
    )


def _remade(tree: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """A modulation with its leaves made anew."""
    if isinstance(tree, Tensor):
        return make(tree)
    parts = [_remade(part, make) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def _low(leaf: Tensor) -> Tensor:
    """From 0.5 to 1: a positive scale in every form, so that its sign says nothing."""
    return (1 + _random(tuple(leaf.shape), leaf.device).sigmoid()) / 2


def _high(leaf: Tensor) -> Tensor:
    """From 1 to 2, another one for each sample and channel."""
    return 1 + _random(tuple(leaf.shape), leaf.device).sigmoid()


def _random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device="cpu").to(device)


def _differs(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs differ by more than the eps of a norm makes."""
    spread = max(one.std().item(), _EPS)
    return (one - other).abs().max().item() > _EPS * spread
