"""What rounding and gradients may do to a modulator: gradcheck, bfloat16 and autocast."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from condmod.testing import common
from condmod.testing.cases import (
    ModulatorCase,
    convert,
    passed_on,
    tensors,
    to_float,
    with_leaves,
)

_BATCH = 256
_TOLERANCE = 0.25
_TINY = 2**-8  # 1 + s rounds to 1 in bfloat16 for every s from 0 to here
_SIGNALS = 2**-12  # how large the generated parts are that must survive a bfloat16 generator


def gradcheck(case: ModulatorCase) -> None:
    """Analytic gradients equal numeric ones in float64, for features and condition."""
    module = case.stirred(torch.float64)
    x, condition = case.inputs(2, _small(case), torch.float64)
    floats = [leaf for leaf in tensors(condition) if leaf.is_floating_point()]
    x.requires_grad_()
    for leaf in floats:
        leaf.requires_grad_()

    def run(x: Tensor, *leaves: Tensor) -> Tensor:
        left = iter(leaves)
        replaced = convert(condition, lambda t: next(left) if t.is_floating_point() else t)
        return case.call(module, x, replaced)

    assert torch.autograd.gradcheck(run, (x, *floats)), "gradcheck failed"


def precision(case: ModulatorCase) -> None:
    """Half precision and autocast stay close to float32; bfloat16 loses no part beside 1."""
    module = case.stirred()
    x, condition = case.inputs(4)
    want = case.call(module, x, condition)
    limit = 0.06 * max(want.abs().max().item(), 1.0)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(torch.get_default_device().type, dtype):
            y = case.call(module, x, condition)
            given = {x.dtype, case.output(x).dtype}  # a layer's output is half precision there
        assert y.dtype in given, f"under autocast to {dtype} {x.dtype} became {y.dtype}"
        common.close(y, want, limit, f"under autocast to {dtype}")
        y = case.call(case.stirred(dtype), *case.inputs(4, dtype=dtype))
        assert y.dtype == dtype, f"{dtype} features became {y.dtype}"
        common.close(y, want, limit, f"in {dtype}")
    with torch.no_grad():
        _small_parts(case)
    _small_signals(case)


def _small_parts(case: ModulatorCase) -> None:
    """In turn, each leaf moves a little: the features say so as rounded float64 would.

    A leaf moves away from 0, where `1 + s` in bfloat16 loses it, and from what was generated;
    the others stay as generated, so that most sums round either way. Where a correctly rounded
    pass could not show the move either, nothing is asked; nor of a condition that is passed on,
    from which `modulate` generates, as a Linear in bfloat16 does in `generate`.
    """
    low: Any = case.stirred(torch.bfloat16)
    exact: Any = copy.deepcopy(low).double()
    x, condition = case.inputs(_BATCH, dtype=torch.float64)
    x = x.bfloat16()
    leaves = [
        leaf.bfloat16() if leaf.is_floating_point() else leaf
        for leaf in tensors(exact.generate(condition))
    ]
    tree = exact.generate(condition)

    def effect(run: str, now: list[Tensor], before: list[Tensor]) -> Tensor:
        outs = []
        for parts in (now, before):
            modulation = with_leaves(tree, parts)
            if run == "low":
                out = case.apply(low, x, modulation)
            else:
                rounded = run == "rounded"
                wide = to_float(modulation, torch.float64)
                out = (
                    _rounded_pass(case, exact, x, wide)
                    if rounded
                    else case.apply(exact, x.double(), wide)
                )
            outs.append(out.double())
        return (outs[0] - outs[1]).flatten()

    for number, leaf in enumerate(leaves):
        if not leaf.is_floating_point() or passed_on(tensors(tree)[number], condition):
            continue
        for before, now in _moves(leaf):
            sets = [[*leaves[:number], part, *leaves[number + 1 :]] for part in (now, before)]
            want = effect("exact", *sets)
            if not want.isfinite().all() or want.square().mean() < 2.0**-40:
                continue
            power = want @ want
            possible = (effect("rounded", *sets) @ want / power).item()
            if possible < 0.2:
                continue
            share = (effect("low", *sets) @ want / power).item() / possible
            assert abs(share - 1) < _TOLERANCE, (
                f"in bfloat16 the features feel {share:.2f} of a small change of leaf {number} "
                f"of the modulation; compute 1 + s and the like in float32"
            )


def _moves(leaf: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A leaf before and after a small move, up and down, from 0 and from where it is."""
    draw = torch.Generator().manual_seed(5)
    for before in (torch.zeros_like(leaf), leaf):
        for sign in (1, -1):
            noise = torch.rand(leaf.shape, generator=draw, dtype=torch.float64, device="cpu")
            noise = noise.to(leaf.device)
            yield before, (before.double() + sign * _TINY * noise).bfloat16()


def _rounded_pass(case: ModulatorCase, exact: Any, x: Tensor, modulation: Any) -> Tensor:
    """The pass in float64, rounded where the contract has features in their own dtype."""

    def rounded(features: Tensor) -> Tensor:
        return features.to(x.dtype).double()

    h = x.double()
    if not case.around:
        return rounded(exact.modulate(h, modulation))
    stages = [h]
    for number, (part, sublayer) in enumerate(
        zip(modulation, case.sublayers(h.dtype), strict=True)
    ):
        read = stages[exact.reads[number] if exact.reads else number]
        entered = rounded(exact.enter(read, part, sublayer))
        stages.append(rounded(exact.exit(stages[-1], rounded(sublayer(entered)), part, sublayer)))
    return stages[-1]


def _small_signals(case: ModulatorCase) -> None:
    """A generator in bfloat16 with small parameters still moves float32 features as it should.

    What only `generate` uses is scaled down until the generated parts are about 2^-12, and cast;
    a form such as exp(s) or 1 + s computed in the parameters' dtype loses them.
    """
    exact: Any = case.stirred(torch.bfloat16).double()
    x, condition = case.inputs(_BATCH, dtype=torch.bfloat16)
    x, wide = x.float(), to_float(condition, torch.float64)
    own = _generators(case, exact, x.double(), wide)
    if not own:
        return
    start = {name: dict(exact.named_parameters())[name].detach().clone() for name in own}

    def scaled(factor: float, module: Any) -> Any:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in own:
                    parameter.copy_((start[name] * factor).bfloat16())
        return module

    def generated(factor: float) -> list[Tensor]:
        return tensors(to_float(scaled(factor, exact).generate(wide), torch.float64))

    with torch.no_grad():
        none = generated(0.0)

        def size(factor: float) -> float:
            pairs = zip(generated(factor), none, strict=True)
            floats = [(a, b) for a, b in pairs if a.is_floating_point()]
            return max(float((a - b).square().mean().sqrt()) for a, b in floats)

        low_power, high_power = -24.0, 0.0
        for _ in range(12):
            middle = (low_power + high_power) / 2
            if size(2.0**middle) > _SIGNALS:
                high_power = middle
            else:
                low_power = middle
        factor = 2.0**low_power
        low: Any = case.stirred(torch.bfloat16)
        for name, parameter in low.named_parameters():
            if name not in own:
                parameter.data = parameter.data.float()  # what meets float32 features
        tiny = convert(scaled(factor, low).generate(condition), torch.clone)
        zero = convert(scaled(0.0, low).generate(condition), torch.clone)
        true = scaled(factor, exact).generate(wide)
        rest = with_leaves(true, none)
        for number, leaf in enumerate(tensors(true)):
            if not leaf.is_floating_point():
                continue
            want = case.apply(exact, x.double(), _swap(rest, number, leaf))
            want = (want - case.apply(exact, x.double(), rest)).flatten()
            if not want.isfinite().all() or want.square().mean() < 2.0**-40:
                continue
            part = tensors(tiny)[number]
            got = case.apply(low, x, _swap(zero, number, part)).double()
            got = (got - case.apply(low, x, zero).double()).flatten()
            share = (got @ want / (want @ want)).item()
            assert abs(share - 1) < _TOLERANCE, (
                f"with parameters in bfloat16, float32 features feel {share:.2f} of small "
                f"generated parts (leaf {number}); apply forms such as exp(s) in float32, in "
                "modulate"
            )


def _generators(case: ModulatorCase, module: Any, x: Tensor, condition: Any) -> set[str]:
    """The parameters that `generate` uses; none where `modulate` shares one with it."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    modulation = module.generate(condition)
    leaves = [leaf for leaf in tensors(modulation) if leaf.requires_grad]
    if not named or not leaves:
        return set()
    still = convert(modulation, torch.Tensor.detach)
    y = case.apply(module, x, still)

    def used(total: Tensor) -> set[str]:
        if not total.requires_grad:
            return set()
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        return {name for name, grad in zip(named, found, strict=True) if grad is not None}

    own = used(torch.stack([leaf.sum() for leaf in leaves]).sum())
    return set() if own & used(y.sum()) else own


def _swap(tree: Any, number: int, leaf: Tensor) -> Any:
    leaves = tensors(tree)
    return with_leaves(tree, [*leaves[:number], leaf, *leaves[number + 1 :]])


def _small(case: ModulatorCase) -> tuple[int, ...]:
    return min((p for p in case.positions if p), key=lambda p: (len(p), p), default=())
