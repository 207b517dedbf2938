"""The laws of an encoder; each takes a case and raises AssertionError with what is wrong.

Where a law has nothing to check it skips, and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from condmod.config import NullableConfig
from condmod.encoder import Encoder
from condmod.errors import ConditionError, CondmodError
from condmod.site import Signal
from condmod.testing import common
from condmod.testing.cases import EncoderCase, convert, repeat, tensors

Law = Callable[[EncoderCase], None]


def shape(case: EncoderCase) -> None:
    """Output is (B, *positions, out_dim) in the module's dtype, which follows `.to()`."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        module = case.stirred(dtype)
        assert case.out_dim in (None, module.out_dim), f"out_dim is {module.out_dim}"
        for batch in (1, 3):
            for positions in case.places:
                out = common.flat(module(case.inputs(batch, positions, dtype)))
                want = (batch, *positions, module.out_dim)
                assert tuple(out.shape) == want, f"got {tuple(out.shape)}, not {want}"
                assert out.dtype == dtype, f"a {dtype} module gives {out.dtype}"


def rows(case: EncoderCase) -> None:
    """The rows of the batch are independent."""
    module = case.stirred()
    given = case.inputs(3)
    out = common.flat(module(given))
    for row in range(3):
        alone = convert(given, lambda leaf, row=row: leaf[row : row + 1])  # type: ignore[misc]
        common.close(common.flat(module(alone))[0], out[row], 1e-5, f"row {row}")


def aligned(case: EncoderCase) -> None:
    """One signal per position with equal rows means the same as one signal per sample."""
    if not case.positions:
        pytest.skip("it takes no signal per position")
    if not case.per_sample:
        pytest.skip("it takes no signal per sample")
    module = case.stirred(torch.float64)
    for positions in case.positions:
        for batch in (1, 2, 5):
            given = case.inputs(batch, (), torch.float64)
            got = common.flat(module(repeat(given, positions)))
            want = repeat(common.flat(module(given)), positions)
            common.close(got, want, 1e-10, f"batch {batch}, positions {positions}")


def reset(case: EncoderCase) -> None:
    """`reset_parameters` restores the published start, after a re-initialisation and `to_empty`."""
    common.check_reset(lambda: case.build(seed=7), 7)


def round_trip(case: EncoderCase) -> None:
    """`configure(str(config)) == config`, and through JSON and YAML."""
    common.check_round_trip(case.config, case.registry)


def options(case: EncoderCase) -> None:
    """Integer options are bounded, and every option is described."""
    common.check_options(type(case.config))


def gradients(case: EncoderCase) -> None:
    """Every parameter gets a gradient from some signal, and a zero one where all are absent."""
    module = case.stirred()
    if not list(module.parameters()):
        pytest.skip("it has no parameters")
    given = case.inputs()
    signals = [given, *(_all_present(module, given, present) for present in (True, False))]
    reached: set[str] = set()
    for number, signal in enumerate(signals):
        module.zero_grad()
        torch.autograd.backward(common.flat(module(signal)).square().sum())
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient (signal {number})"
            assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
            if parameter.grad.any():
                reached.add(name)
    dead = sorted({name for name, _ in module.named_parameters()} - reached)
    assert not dead, f"no signal gives {dead} a gradient"


def absence(case: EncoderCase) -> None:
    """Absent samples become the null whatever they hold; an encoder without a null refuses."""
    module = case.stirred()
    given = case.inputs()
    if not issubclass(case.component.Config, NullableConfig):
        pytest.skip("its signals are absent one by one, in the encoders of its inputs")
    if module.null is None:
        with pytest.raises(ConditionError, match="nullable=True"):
            module(_absent(given, 3, [True, False, True]))
        return
    out = common.flat(module(_absent(given, 3, [True, False, True])))
    whole = common.flat(module(given))
    assert torch.equal(out[0], whole[0]), "a present sample changes when another is absent"
    assert torch.equal(out[1], module.null.expand_as(out[1])), "an absent sample is not the null"
    value = given.value if isinstance(given, Signal) else given
    spoilt = value.clone()
    spoilt[1] = float("nan") if value.is_floating_point() else -1
    again = common.flat(module(_absent(given, 3, [True, False, True])._replace(value=spoilt)))
    assert torch.equal(again, out), "what an absent sample holds leaks into the output"


def gradcheck(case: EncoderCase) -> None:
    """Analytic gradients equal numeric ones in float64, for parameters and floating signals."""
    module = case.stirred(torch.float64)
    given = case.inputs(2, dtype=torch.float64)
    floats = [leaf for leaf in tensors(given) if leaf.is_floating_point()]
    names = [name for name, _ in module.named_parameters()]
    for leaf in floats:
        leaf.requires_grad_()

    def run(*leaves: Tensor) -> Tensor:
        left = iter(leaves[: len(floats)])
        signal = convert(given, lambda t: next(left) if t.is_floating_point() else t)
        state = dict(zip(names, leaves[len(floats) :], strict=True))
        return common.flat(torch.func.functional_call(module, state, (signal,)))

    inputs = (*floats, *module.parameters())
    if not inputs:
        pytest.skip("it has no parameters, and an integer signal has no gradient")
    assert torch.autograd.gradcheck(run, inputs), "gradcheck failed"


def precision(case: EncoderCase) -> None:
    """A half-precision module reads the same signal, 937 and not 936, and rounds what comes out."""
    module = case.stirred()
    given = case.inputs()
    want = common.flat(module(given))
    limit = 0.06 * max(want.abs().max().item(), 1.0)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(torch.get_default_device().type, dtype):
            amp = common.flat(module(given))
        common.close(amp, want, limit, f"under autocast to {dtype}")
        low = case.stirred(dtype)
        common.close(common.flat(low(case.inputs(dtype=dtype))), want, limit, f"in {dtype}")
        wide = case.stirred(dtype).float()  # the same parameters
        for what, signal in _large_numbers(wide, given):
            exact = common.flat(wide(signal))
            if not exact.to(dtype).isfinite().all():  # as of an encoder that hands its input on
                continue
            got = common.flat(low(signal))
            near = 2**-5 * max(exact.abs().max().item(), 1.0) if list(low.parameters()) else 0.0
            common.close(got, exact.to(dtype), near, f"{what} in a module of {dtype}")


def _large_numbers(module: Encoder[Any], given: Any) -> Iterator[tuple[str, Any]]:
    """The signal with large numbers wherever it has one number per sample and takes large ones."""
    for key in [None, *given] if isinstance(given, Mapping) else [None]:
        item = given if key is None else given[key]
        value = item.value if isinstance(item, Signal) else item
        if not isinstance(value, Tensor) or value.ndim != 1:
            continue
        floating = value.is_floating_point()
        numbers = [936, 937, 999_937] if floating else [937, 999_999, 1_000_000]
        large = torch.tensor(numbers, dtype=value.dtype)
        item = item._replace(value=large) if isinstance(item, Signal) else large
        signal = item if key is None else {**given, key: item}
        try:
            module(signal)
        except CondmodError:  # a label has no such class
            continue
        yield f"{key or 'the signal'} = {numbers}", signal


def compiled(case: EncoderCase) -> None:
    """`torch.compile(fullgraph=True)` equals eager."""
    given = case.inputs()
    common.check_compile(case.stirred(), lambda module: module(given))


def exported(case: EncoderCase) -> None:
    """`torch.export` equals eager."""
    module = case.stirred()
    given = case.inputs()
    program = torch.export.export(module, (given,))
    got, want = program.module()(given), module(given)
    common.close(common.flat(got), common.flat(want), 1e-5, "exported")


def copies(case: EncoderCase) -> None:
    """Deepcopy, pickle and a strict state_dict keep the output."""
    given = case.inputs()
    common.check_copies(case.stirred(), lambda module: module(given))


def functional_call(case: EncoderCase) -> None:
    """`torch.func.functional_call` uses the parameters that it is given, whose dtype comes out."""
    given = case.inputs()
    module = case.stirred()
    common.check_functional_call(module, lambda call: call(given))
    common.check_half_call(module, (given,), (case.inputs(dtype=torch.bfloat16),))


def meta(case: EncoderCase) -> None:
    """It builds on the meta device, and gets there its start or the parameters of another."""
    given = case.inputs()
    common.check_meta(case.build, 0, lambda module: module(given))


def recompiles(case: EncoderCase) -> None:
    """Several instances share one graph, and new batches and positions need few."""
    modules = [case.build(seed=seed) for seed in range(4)]

    def call(module: Encoder[Any], signal: Any) -> Any:
        return module(signal)

    place = max(case.positions, key=len, default=())
    given = case.inputs(2, tuple(3 for _ in place))
    shapes = [(3, 3), (5, 7), (4, 6), (1, 5)]
    others = [case.inputs(batch, tuple(size for _ in place)) for batch, size in shapes]
    instances, graphs = common.count_graphs(
        call, [(module, given) for module in modules], [(modules[0], new) for new in others]
    )
    assert instances == 1, f"{len(modules)} instances need {instances} graphs"
    assert graphs <= 4, f"{1 + len(shapes)} shapes of signals need {graphs} graphs"


def reference(case: EncoderCase) -> None:
    """The output equals the naive float64 reference."""
    module = case.stirred(torch.float64)
    for positions in case.places:
        given = case.inputs(2, positions, torch.float64)
        want = case.reference(module.state_dict(), given)
        common.close(common.flat(module(given)), want, 1e-10, f"positions {positions}")


def _all_present(module: Encoder[Any], given: Any, present: bool) -> Any:
    """The signal with every sample there or absent, wherever it can be absent."""
    if isinstance(given, Mapping):
        return {
            key: _all_present(module, item, present)
            if isinstance(item, Signal) and item.present is not None
            else item
            for key, item in given.items()
        }
    if module.null is None and not (isinstance(given, Signal) and given.present is not None):
        return given
    signal = given if isinstance(given, Signal) else Signal(given)
    return _absent(signal, len(signal.value), [present] * len(signal.value))


def _absent(given: Any, batch: int, present: list[bool]) -> Signal:
    signal = given if isinstance(given, Signal) else Signal(given)
    assert len(present) == batch
    return signal._replace(present=torch.tensor(present))


ENCODER_LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        shape,
        rows,
        aligned,
        reset,
        round_trip,
        options,
        gradients,
        absence,
        gradcheck,
        precision,
        compiled,
        recompiles,
        exported,
        copies,
        functional_call,
        meta,
        reference,
    )
}
