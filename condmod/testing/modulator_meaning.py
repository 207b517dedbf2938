"""What a modulator's output is: the laws of shape, meaning and start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from condmod.errors import CondmodError, SpecError
from condmod.testing import common
from condmod.testing.cases import ModulatorCase, convert, passed_on, tensors


def shape(case: ModulatorCase) -> None:
    """Output has the shape of the features, or of what the sublayer gives, their dtype and device.

    For every rank, batch and memory layout.
    """
    module = case.stirred()
    for positions in case.positions:
        for batch in (1, 2, 5):
            for aligned in case.places(positions):
                x, condition = case.inputs(batch, positions, aligned=aligned)
                y = case.call(module, x, condition)
                want = case.output(x).shape
                assert y.shape == want, f"{tuple(x.shape)} became {tuple(y.shape)}"
                assert y.dtype == x.dtype, f"{x.dtype} became {y.dtype}"
                assert y.device == x.device, f"{x.device} became {y.device}"
                assert y.is_contiguous(), (
                    f"contiguous features {tuple(x.shape)} came out with strides {y.stride()} "
                    f"(condition aligned: {aligned}); y.view(B, -1) would fail"
                )
                strided = _other_layout(x, case.site.channel_dim)
                again = case.call(module, strided, condition)
                assert again.dtype == x.dtype, f"{x.dtype} became {again.dtype} in another layout"
                common.close(again, y, 1e-5, f"the same features with strides {strided.stride()}")


def _other_layout(x: Tensor, channel_dim: int) -> Tensor:
    """The same features, in memory as if the channels were at the other end (channels_last)."""
    here, there = (1, -1) if channel_dim == 1 else (-1, 1)
    return x.movedim(here, there).contiguous().movedim(there, here)


def identity(case: ModulatorCase) -> None:
    """With init='identity' the first output is, bit for bit, the pass at scale 1, shift 0."""
    spec = _with_init(case, "identity")
    if isinstance(spec, str):
        pytest.skip(spec)
    module = case.build(spec=spec)
    for aligned in case.places():
        x, condition = case.inputs(aligned=aligned)
        want = x if case.neutral is None else case.neutral(module, x, *case.sublayers(x.dtype))
        assert torch.equal(case.call(module, x, condition), want), "the first output differs"


def gradients(case: ModulatorCase) -> None:
    """Every parameter and every generated part gets a gradient within two optimiser steps."""
    for init in ("published", "identity"):
        spec = _with_init(case, init)
        if isinstance(spec, str):
            continue  # the law of identity says why
        module = case.build(spec=spec)
        named = dict(module.named_parameters())
        if not named:
            pytest.skip("it has no parameters")
        optimiser = torch.optim.SGD(named.values(), lr=0.1)
        reached: set[str] = set()
        parts: set[int] = set()
        x, condition = case.inputs()
        torch.manual_seed(0)
        goal = torch.randn_like(case.output(x))
        for _ in range(3):  # the start and two steps
            optimiser.zero_grad()
            modulation = cast("Any", module).generate(condition)
            leaves = [
                leaf
                for leaf in tensors(modulation)
                if leaf.is_floating_point() and not passed_on(leaf, condition)
            ]
            for leaf in leaves:
                assert leaf.requires_grad, f"init={init!r}: a generated part has no gradient"
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
    """`reset_parameters` restores the published start, after a re-initialisation and `to_empty`."""
    common.check_reset(lambda: case.build(seed=7), 7)


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
    if not case.takes_aligned() or case.component.kinds == {"aligned"}:
        pytest.skip(f"it takes one kind of condition: {', '.join(sorted(case.component.kinds))}")
    module = case.stirred(torch.float64)
    for positions in case.positions:
        for batch in (1, 2, 5):
            if not positions:
                continue
            x, condition = case.inputs(batch, positions, torch.float64, aligned=False)
            want = case.call(module, x, condition)
            got = case.call(module, x, case.repeat(condition, positions))
            common.close(got, want, 1e-10, f"batch {batch}, positions {positions}")


def table(case: ModulatorCase) -> None:
    """Rows with an index mean the same as the aligned condition that they spell out."""
    if "rows" not in case.component.kinds:
        pytest.skip("it takes no rows of a table")
    module = case.stirred(torch.float64)
    for positions in filter(None, case.positions):
        for batch in (1, 2, 5):
            x, signal, spelt = case.table(batch, positions, torch.float64)
            want = case.call(module, x, spelt)
            common.close(case.call(module, x, signal), want, 1e-10, f"positions {positions}")
    single = case.stirred()
    x, signal, _ = case.table(2, max(case.positions, key=len))
    assert signal.index is not None
    common.check_compile(single, lambda m: m(x, signal, *case.sublayers()))
    for what, index in {
        "a row that is not there": signal.index + 2,
        "a negative row": signal.index - 1,
        "an index that is no integer": signal.index.float(),
        "an index of other positions": signal.index[:, :1],
        "an index of another batch": signal.index[:1],
    }.items():
        wrong = signal._replace(index=index)
        _check_refused(case, what, lambda c=wrong: case.call(single, x, c))  # type: ignore[misc]


def reference(case: ModulatorCase) -> None:
    """The output equals the naive float64 reference."""
    module = case.stirred(torch.float64)
    state = module.state_dict()
    for positions in case.positions:
        for aligned in case.places(positions):
            x, condition = case.inputs(2, positions, torch.float64, aligned=aligned)
            want = case.reference(state, x, condition, *case.sublayers(x.dtype))
            got = case.call(module, x, condition)
            common.close(got, want, 1e-10, f"positions {positions}, aligned {aligned}")


def bad_shapes(case: ModulatorCase) -> None:
    """A condition or features of another shape is an error that names the site and the shapes."""
    module = case.stirred()
    kinds, dim = case.component.kinds, case.site.channel_dim
    positions = max(case.positions, key=len)
    x, condition = case.inputs(3, positions)
    wrong: dict[str, tuple[Tensor, Any]] = {
        "features": (x.narrow(dim, 0, case.site.features - 1), condition),
    }
    if kinds != {"self"}:
        wrong["batch of the condition"] = (x, case.inputs(1, positions)[1])
        wrong["batch of the features"] = (x[:2], condition)
    if case.condition is None and isinstance(condition, Tensor):
        place = 1 if condition.ndim == 2 else dim
        wrong["width"] = (x, condition.narrow(place, 0, condition.shape[place] - 1))
        wrong["rank 1"] = (x, condition.flatten()[: len(x)])
        wrong["integers"] = (x, condition.long())
    if kinds == {"aligned"} and positions:
        wrong["a global condition"] = (x, case.inputs(3, (), aligned=False)[1])
    if kinds == {"global"} and positions:
        wrong["an aligned condition"] = (x, case.inputs(3, positions, aligned=True)[1])
    if "aligned" in kinds and positions:
        longer = (*positions[:-1], positions[-1] + 1)
        wrong["positions"] = (x, case.inputs(3, longer, aligned=True)[1])
        one = (*positions[:-1], 1)
        wrong["positions of length 1"] = (x, case.inputs(3, one, aligned=True)[1])
        if len(positions) > 1:
            wrong["rank"] = (x, case.inputs(3, positions[:1], aligned=True)[1])
    plain = kinds <= {"global", "aligned", "rows"}
    for what, (features, given) in wrong.items():
        shapes = [tuple(leaf.shape) for leaf in (features, *tensors(given))]
        _check_refused(
            case,
            what,
            lambda x=features, c=given: case.call(module, x, c),  # type: ignore[misc]
            shapes if plain and what != "integers" else (),
        )
    modulation = cast("Any", module).generate(condition)
    if tensors(modulation):  # the two phases by themselves are as strict
        for what in ("batch of the features", "features"):
            features = wrong[what][0]
            _check_refused(case, what, lambda x=features: case.apply(module, x, modulation))  # type: ignore[misc]
    if case.around:
        wide = [lambda h: torch.cat([h, h, h], dim)] * len(case.sublayers())
        reads_weight = cast("Any", case.component).reads_weight
        shapes = [] if reads_weight else [tuple(x.shape)]
        _check_refused(
            case,
            "a function, which has no weight" if reads_weight else "a sublayer of another width",
            lambda: cast("Any", module).around(x, modulation, *wide),
            shapes,
        )


def _check_refused(
    case: ModulatorCase,
    what: str,
    run: Callable[[], Tensor],
    shapes: Sequence[tuple[int, ...]] = (),
) -> None:
    try:
        run()
    except CondmodError as error:
        text = str(error)
    else:
        raise AssertionError(f"{what}: no error, though it does not fit")
    assert case.component.name in text, f"{what}: the error does not name the component"
    assert case.site.name in text, f"{what}: the error does not name the site"
    said = not shapes or any(str(shape) in text for shape in shapes)
    assert said, f"{what}: the error says none of the shapes {shapes}"


def round_trip(case: ModulatorCase) -> None:
    """`configure(str(config)) == config`, and through JSON and YAML."""
    common.check_round_trip(case.config, case.registry)


def options(case: ModulatorCase) -> None:
    """Integer options are bounded, and every option is described."""
    common.check_options(type(case.config))


def _with_init(case: ModulatorCase, init: str) -> dict[str, Any] | str:
    """The case's spec with another init, or the reason why there is none."""
    config = case.config
    if init == "published":
        return config.model_dump()
    if "init" not in type(config).model_fields:
        return "it has no option init"
    spec = {**config.model_dump(), "init": init}
    try:
        type(config).from_options({k: v for k, v in spec.items() if k != "name"})
    except SpecError as error:
        if "init='identity'" in str(error):
            return f"it cannot start as the identity: {error}"
        raise AssertionError(f"init='identity' is refused unclearly: {error}") from None
    return spec
