"""The laws of a modulator; each takes a case and raises AssertionError with what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from condmod.errors import CondmodError, SpecError
from condmod.testing import common
from condmod.testing.cases import ModulatorCase, convert, tensors, to_float

Law = Callable[[ModulatorCase], None]


def shape(case: ModulatorCase) -> None:
    """Output has the features' shape, dtype and device, for every rank and batch size."""
    module = case.stirred()
    for positions in case.positions:
        for batch in (1, 2, 5):
            for aligned in {False, case.takes_aligned() and bool(positions)}:
                x, condition = case.inputs(batch, positions, aligned=aligned)
                y = case.call(module, x, condition)
                assert y.shape == x.shape, f"{tuple(x.shape)} became {tuple(y.shape)}"
                assert y.dtype == x.dtype, f"{x.dtype} became {y.dtype}"
                assert y.device == x.device, f"{x.device} became {y.device}"


def identity(case: ModulatorCase) -> None:
    """With init='identity' the first output is, bit for bit, the pass at scale 1, shift 0."""
    spec = _with_init(case, "identity")
    if spec is None:
        return
    module = case.build(spec=spec)
    for aligned in {False, case.takes_aligned()}:
        x, condition = case.inputs(aligned=aligned)
        want = x if case.neutral is None else case.neutral(module, x, *case.sublayers())
        assert torch.equal(case.call(module, x, condition), want), "the first output differs"


def gradients(case: ModulatorCase) -> None:
    """Every parameter and every generated part gets a gradient within two optimiser steps."""
    for init in ("published", "identity"):
        spec = _with_init(case, init)
        if spec is None:
            continue
        module = case.build(spec=spec)
        named = dict(module.named_parameters())
        if not named:
            return
        optimiser = torch.optim.SGD(named.values(), lr=0.1)
        reached: set[str] = set()
        parts: set[int] = set()
        x, condition = case.inputs()
        torch.manual_seed(0)
        goal = torch.randn_like(x)
        for _ in range(3):  # the start and two steps
            optimiser.zero_grad()
            modulation = cast("Any", module).generate(condition)
            leaves = tensors(modulation)
            for leaf in leaves:
                leaf.retain_grad()
            loss = (case.apply(module, x, modulation) - goal).square().mean()
            torch.autograd.backward(loss)
            reached |= {k for k, p in named.items() if p.grad is not None and p.grad.any()}
            parts |= {i for i, t in enumerate(leaves) if t.grad is not None and t.grad.any()}
            optimiser.step()
        dead = sorted(set(named) - reached)
        assert not dead, f"init={init!r}: no gradient reaches {dead}"
        assert len(parts) == len(leaves), f"init={init!r}: a generated part gets no gradient"


def reset(case: ModulatorCase) -> None:
    """After `model.apply(reinit)`, `reset_parameters` restores the published start."""
    common.check_reset(case.build(seed=7), 7)


def rows(case: ModulatorCase) -> None:
    """The rows of the batch are independent."""
    module = case.stirred().eval()
    x, condition = case.inputs(3)
    y = case.call(module, x, condition)
    for row in range(3):
        alone = convert(condition, lambda leaf, row=row: leaf[row : row + 1])  # type: ignore[misc]
        common.close(case.call(module, x[row : row + 1], alone)[0], y[row], 1e-5, f"row {row}")


def aligned(case: ModulatorCase) -> None:
    """A global condition means the same as an aligned one with equal rows."""
    if not case.takes_aligned() or not ({"global", "raw"} & case.component.kinds):
        return
    module = case.stirred(torch.float64)
    for positions in case.positions:
        for batch in (1, 2, 5):
            if not positions:
                continue
            x, condition = case.inputs(batch, positions, torch.float64)
            want = case.call(module, x, condition)
            got = case.call(module, x, case.repeat(condition, positions))
            common.close(got, want, 1e-10, f"batch {batch}, positions {positions}")


def round_trip(case: ModulatorCase) -> None:
    """`configure(str(config)) == config`, and through JSON and YAML."""
    common.check_round_trip(case.config, case.registry)


def options(case: ModulatorCase) -> None:
    """Integer options are bounded, and every option is described."""
    common.check_options(type(case.config))


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
    """In bfloat16 a scale of 1e-3 still counts, and autocast stays close to float32."""
    module = case.stirred()
    x, condition = case.inputs(4, case.positions[-1])
    with torch.autocast("cpu", torch.bfloat16):
        y = case.call(module, x, condition)
    assert y.dtype == x.dtype, f"under autocast {x.dtype} became {y.dtype}"
    want = case.call(module, x, condition)
    spread = want.abs().max().item()
    common.close(y, want, 0.06 * max(spread, 1.0), "under autocast")
    low = case.stirred(torch.bfloat16)
    half = case.inputs(4, case.positions[-1], torch.bfloat16)
    assert case.call(low, *half).dtype == torch.bfloat16, "bfloat16 features became another dtype"
    _small_scales(case)


def _small_scales(case: ModulatorCase) -> None:
    """The effect of scales around 1e-3, averaged over many features, is what float64 says."""
    x, condition = case.inputs(2048, case.positions[-1])
    module: Any = case.stirred()
    low: Any = case.stirred(torch.bfloat16)
    exact: Any = case.stirred(torch.bfloat16).double()
    x = x.bfloat16()

    def only(modulation: Any, size: float) -> Any:
        if isinstance(modulation, Tensor) or not hasattr(modulation, "scale"):
            parts = [only(part, size) for part in modulation]
            return tuple(parts) if not hasattr(modulation, "_fields") else modulation
        leaf = modulation.scale
        draw = torch.Generator().manual_seed(5)
        scale = torch.rand(leaf.shape, generator=draw) * 2 - 1
        shift = 0.1 * torch.randn(leaf.shape, generator=draw)  # so that sums round either way
        others = {"gate": torch.ones_like(leaf), "shift": shift}
        known = {name: leaf for name, leaf in others.items() if name in modulation._fields}
        return modulation._replace(scale=scale * size, **known)

    modulation = module.generate(condition)
    scaled = any(hasattr(part, "scale") for part in (modulation, *modulation))
    if not scaled:
        return
    small, none = (to_float(only(modulation, size), torch.bfloat16) for size in (2**-9, 0.0))
    got = (case.apply(low, x, small).double() - case.apply(low, x, none).double()).flatten()
    wide = to_float((x, small, none), torch.float64)
    want = (case.apply(exact, wide[0], wide[1]) - case.apply(exact, wide[0], wide[2])).flatten()
    slope = (got @ want / (want @ want)).item()
    assert abs(slope - 1) < 0.25, f"in bfloat16 scales of 1e-3 have {slope:.2f} of their effect"


def compiled(case: ModulatorCase) -> None:
    """`torch.compile(fullgraph=True)` equals eager, gradients too, for both kinds of condition."""
    module = case.stirred()
    for aligned in {False, case.takes_aligned()}:
        x, condition = case.inputs(aligned=aligned)
        common.check_compile(
            module,
            lambda m, x=x, c=condition: m(x, c, *case.sublayers()),  # type: ignore[misc]
        )


def exported(case: ModulatorCase) -> None:
    """`torch.export` of the forward equals eager."""
    module = case.stirred()
    x, condition = case.inputs()
    want = case.call(module, x, condition)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor, condition: Any) -> Tensor:
            return case.call(self.inner, x, condition)

    program = torch.export.export(Whole(), (x, condition))
    common.close(program.module()(x, condition), want, 1e-5, "exported")


def copies(case: ModulatorCase) -> None:
    """Deepcopy, pickle and a strict state_dict keep the output."""
    x, condition = case.inputs()
    common.check_copies(case.stirred(), lambda module: case.call(module, x, condition))


def functional_call(case: ModulatorCase) -> None:
    """`torch.func.functional_call` uses the parameters that it is given."""
    x, condition = case.inputs()
    sublayers = case.sublayers()
    common.check_functional_call(case.stirred(), lambda call: call(x, condition, *sublayers))


def meta(case: ModulatorCase) -> None:
    """It builds on the meta device."""
    common.check_meta(case.build, case.build())


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
        if case.around:
            assert isinstance(modulation, tuple), "a sublayer modulator generates a tuple"
            assert len(modulation) == module.parts, f"{len(modulation)} parts, not {module.parts}"
        _check_tree(modulation, batch, top=case.around)


def _check_tree(node: Any, batch: int, *, top: bool) -> None:
    if isinstance(node, Tensor):
        assert node.shape[:1] == (batch,), f"a leaf {tuple(node.shape)} has no batch first"
        return
    assert node is not None, "a leaf is None; use a modulation type without it"
    named = isinstance(node, tuple) and (top or hasattr(node, "_fields"))
    assert named, f"a modulation is a NamedTuple; got {type(node).__name__}"
    for child in node:
        _check_tree(child, batch, top=False)


def reference(case: ModulatorCase) -> None:
    """The output equals the naive float64 reference."""
    module = case.stirred(torch.float64)
    state = module.state_dict()
    for positions in case.positions:
        for aligned in {False, case.takes_aligned() and bool(positions)}:
            x, condition = case.inputs(2, positions, torch.float64, aligned=aligned)
            want = case.reference(state, x, condition, *case.sublayers())
            got = case.call(module, x, condition)
            common.close(got, want, 1e-10, f"positions {positions}, aligned {aligned}")


def bad_shapes(case: ModulatorCase) -> None:
    """A condition or features of another shape is an error that names the site and the shapes."""
    module = case.stirred()
    positions = max(case.positions, key=len)
    x, condition = case.inputs(3, positions)
    wrong: dict[str, tuple[Tensor, Any]] = {
        "batch of the condition": (x, case.inputs(1, positions)[1]),
        "batch of the features": (x[:2], condition),
        "features": (x.narrow(case.site.channel_dim, 0, case.site.features - 1), condition),
    }
    if case.site.condition_dim:
        wrong["width"] = (x, condition[..., :-1])
        wrong["rank 1"] = (x, condition[:, 0])
        wrong["integers"] = (x, condition.long())
    if "aligned" in case.component.kinds and positions:
        longer = (*positions[:-1], positions[-1] + 1)
        wrong["positions"] = (x, case.inputs(3, longer, aligned=True)[1])
        one = (*positions[:-1], 1)
        wrong["positions of length 1"] = (x, case.inputs(3, one, aligned=True)[1])
        if len(positions) > 1:
            wrong["rank"] = (x, case.inputs(3, positions[:1], aligned=True)[1])
    for what, (features, given) in wrong.items():
        _check_refused(case, what, lambda x=features, c=given: case.call(module, x, c))  # type: ignore[misc]
    modulation = cast("Any", module).generate(condition)
    if tensors(modulation):  # the two phases by themselves are as strict
        for what in ("batch of the features", "features"):
            features = wrong[what][0]
            _check_refused(case, what, lambda x=features: case.apply(module, x, modulation))  # type: ignore[misc]


def _check_refused(case: ModulatorCase, what: str, run: Callable[[], Tensor]) -> None:
    with pytest.raises(CondmodError) as caught:
        run()
    text = str(caught.value)
    assert case.component.name in text, f"{what}: the error does not name the component"
    assert case.site.name in text, f"{what}: the error does not name the site"


class _Materialised(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators that make a large tensor from small ones alone: a copied broadcast."""

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        inputs = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        if isinstance(out, Tensor) and inputs:
            held = max(leaf.untyped_storage().nbytes() for leaf in inputs)
            if out.untyped_storage().nbytes() >= self.limit > held:
                self.found.append(str(func))
        return out


def no_broadcast_copy(case: ModulatorCase) -> None:
    """No full-size copy of a global condition's modulation is ever made."""
    positions = tuple(16 for _ in max(case.positions, key=len))
    module: Any = case.stirred()
    x, condition = case.inputs(2, positions)
    modulation = module.generate(condition)
    with torch.no_grad(), _Materialised(x.untyped_storage().nbytes()) as noted:
        case.apply(module, x, modulation)
    assert not noted.found, f"a broadcast was copied to full size by {noted.found}"


def _with_init(case: ModulatorCase, init: str) -> dict[str, Any] | None:
    """The case's spec with another init, or None where its config refuses or has none."""
    config = case.config
    if init == "published":
        return config.model_dump()
    if "init" not in type(config).model_fields:
        return None
    spec = {**config.model_dump(), "init": init}
    try:
        type(config).from_options({k: v for k, v in spec.items() if k != "name"})
    except SpecError as error:
        if "init='identity'" in str(error):
            return None  # it says that it cannot start as the identity
        raise AssertionError(f"init='identity' is refused unclearly: {error}") from None
    return spec


def _small(case: ModulatorCase) -> tuple[int, ...]:
    return min((p for p in case.positions if p), key=lambda p: (len(p), p), default=())


MODULATOR_LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        shape,
        identity,
        gradients,
        reset,
        rows,
        aligned,
        round_trip,
        options,
        gradcheck,
        precision,
        compiled,
        exported,
        copies,
        functional_call,
        meta,
        split,
        modulation_tree,
        reference,
        bad_shapes,
        no_broadcast_copy,
    )
}
