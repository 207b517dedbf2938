"""How torch runs a modulator: compiled, exported, copied, on meta, in two phases."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from condmod.testing import common
from condmod.testing.cases import ModulatorCase, tensors

_SITES = 4  # instances that share one graph
_GRAPHS = 4  # for any batch and positions: as they come, dynamic batch, dynamic positions, batch 1


def compiled(case: ModulatorCase) -> None:
    """`torch.compile(fullgraph=True)` equals eager, gradients too, for both kinds of condition."""
    module = case.stirred()
    for aligned in case.places():
        x, condition = case.inputs(aligned=aligned)
        common.check_compile(
            module,
            lambda m, x=x, c=condition: m(x, c, *case.sublayers()),  # type: ignore[misc]
        )


def recompiles(case: ModulatorCase) -> None:
    """Modulators that differ by their sites' names share one graph; new shapes need few."""
    sublayers = case.sublayers()
    modules = [
        case.build(site=dataclasses.replace(case.site, name=f"blocks.{number}.norm1"))
        for number in range(_SITES)
    ]

    def call(module: nn.Module, x: Tensor, condition: Any) -> Any:
        return module(x, condition, *sublayers)

    longest = max(case.positions, key=len)
    given = case.inputs(2, tuple(3 for _ in longest))
    shapes = [(3, 3), (5, 7), (4, 6), (1, 5)]
    others = [case.inputs(batch, tuple(size for _ in longest)) for batch, size in shapes]
    sites, graphs = common.count_graphs(
        call, [(module, *given) for module in modules], [(modules[0], *new) for new in others]
    )
    assert sites == 1, f"{_SITES} sites need {sites} graphs: something depends on their names"
    assert graphs <= _GRAPHS, f"{1 + len(shapes)} shapes of features need {graphs} graphs"


def exported(case: ModulatorCase) -> None:
    """`torch.export` of the forward equals eager, for any batch."""
    module = case.stirred()
    case.sublayers()  # made here, not while it is traced

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor, condition: Any) -> Tensor:
            return case.call(self.inner, x, condition)

    given = case.inputs()
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in tensors(given):
        shapes[tensor] = {0: torch.export.Dim("batch")}
    program = torch.export.export(Whole(), given, dynamic_shapes=shapes).module()
    for batch in (2, 5):
        x, condition = case.inputs(batch)
        want = case.call(module, x, condition)
        common.close(program(x, condition), want, 1e-5, f"exported, batch {batch}")


def copies(case: ModulatorCase) -> None:
    """Deepcopy, pickle and a strict state_dict keep the output."""
    x, condition = case.inputs()
    common.check_copies(case.stirred(), lambda module: case.call(module, x, condition))


def functional_call(case: ModulatorCase) -> None:
    """`torch.func.functional_call` uses the parameters that it is given, in bfloat16 too."""
    x, condition = case.inputs()
    sublayers = case.sublayers()
    module = case.stirred()
    common.check_functional_call(module, lambda call: call(x, condition, *sublayers))
    half = case.inputs(dtype=torch.bfloat16)
    common.check_half_call(
        module, (x, condition, *sublayers), (*half, *case.sublayers(torch.bfloat16))
    )


def meta(case: ModulatorCase) -> None:
    """It builds on the meta device, and gets there its start or the parameters of another."""
    x, condition = case.inputs()
    common.check_meta(case.build, 0, lambda module: case.call(module, x, condition))


def split(case: ModulatorCase) -> None:
    """Generate, then modulate, equals forward; a linear generator's three steps equal generate."""
    module: Any = case.stirred()
    x, condition = case.inputs()
    modulation = module.generate(condition)
    want = case.call(module, x, condition)
    assert torch.equal(case.apply(module, x, modulation), want), "the split differs from forward"
    if hasattr(module, "unpack"):
        steps = module.unpack(module.proj(module.prepare(condition)))
        for got, leaf in zip(tensors(steps), tensors(modulation), strict=True):
            assert torch.equal(got, leaf), "unpack(proj(prepare(c))) differs from generate(c)"


def modulation_tree(case: ModulatorCase) -> None:
    """A modulation is a tree of named tuples of tensors, batch first, with no None leaf."""
    module: Any = case.stirred()
    for batch in (1, 3):
        _, condition = case.inputs(batch)
        modulation = module.generate(condition)
        parts = [modulation]
        if case.around:
            assert isinstance(modulation, tuple), "a sublayer modulator generates a tuple"
            assert len(modulation) == module.parts, f"{len(modulation)} parts, not {module.parts}"
            parts = list(modulation)
        for part in parts:
            _check_tuple(part, batch)


def _check_tuple(node: Any, batch: int) -> None:
    named = isinstance(node, tuple) and hasattr(node, "_fields")
    assert named, f"a modulation is a NamedTuple of tensors; got {type(node).__name__}"
    for name, child in zip(node._fields, node, strict=True):
        assert child is not None, f"the leaf {name!r} is None; use a modulation type without it"
        if not isinstance(child, Tensor):
            _check_tuple(child, batch)
            continue
        shape = tuple(child.shape)
        assert shape[:1] == (batch,), f"the leaf {name!r}, {shape}, has no batch first"


class _Materialised(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators that make a large tensor from small ones alone: a copied broadcast.

    Small is what has less than a number for each position; the channels of a narrow path have one.
    """

    def __init__(self, limit: int, small: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit
        self.small = small
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        inputs = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        if isinstance(out, Tensor) and inputs:
            held = max(leaf.untyped_storage().nbytes() for leaf in inputs)
            if held < self.small and out.untyped_storage().nbytes() >= self.limit:
                self.found.append(str(func))
        return out


def no_broadcast_copy(case: ModulatorCase) -> None:
    """No full-size copy of a global condition's modulation is ever made."""
    if case.component.kinds == {"aligned"}:
        pytest.skip("it takes no global condition")
    axes = len(max(case.positions, key=len))
    positions = (16,) * axes if axes > 1 else (256,) * axes
    module: Any = case.stirred()
    x, condition = case.inputs(2, positions)
    modulation = module.generate(condition)
    if case.component.kinds == {"map"} and all(leaf.ndim > 2 for leaf in tensors(modulation)):
        pytest.skip("no part of its modulation is global")
    size = x.untyped_storage().nbytes()
    with torch.no_grad(), _Materialised(size, size // case.site.features) as noted:
        case.apply(module, x, modulation)
    assert not noted.found, f"a broadcast was copied to full size by {noted.found}"
