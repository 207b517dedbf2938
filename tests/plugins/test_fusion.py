"""The fusion family: labels, numbers and vectors, several signals as one condition."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import condmod
from condmod import ConditionError, ShapeError, Signal, SiteError, SpecError

INPUTS = (
    "inputs={'time': timestep(dim=6), 'label': label(classes=10, dim=5, nullable=True), "
    "'text': vector(features=7, dim=4, nullable=True)}"
)
FUSIONS = [
    f"fuse({INPUTS}, dim=8)",
    f"fuse({INPUTS}, dim=8, hidden=[6])",
    f"fuse({INPUTS}, dim=8, mode='concat')",
    f"fuse({INPUTS}, dim=8, mode='concat', hidden=[])",
    f"fuse({INPUTS}, dim=3, mode='gated', drop=0.3)",
]
SINGLE = [
    "label(classes=10, dim=5, nullable=True)",
    "scalar(dim=5, mean=100., std=20., hidden=[4], nullable=True)",
    "vector(features=7, dim=5, hidden=[4], nullable=True)",
]
MODULATORS = [
    f"multi_condition(encoder={FUSIONS[0]})",
    f"multi_condition(inner=dense_film(init='identity'), encoder={FUSIONS[4]})",
]


def encoder(spec: str, out_dim: int | None = None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return condmod.create_encoder(spec, out_dim).eval()


def modulator(spec: str, seed: int = 0, **place: Any) -> Any:
    torch.manual_seed(seed)
    return condmod.create(spec, features=6, **place).eval()


def stirred(module: Any) -> Any:
    """Away from any special start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def signals(spec: str, batch: int = 3, positions: tuple[int, ...] = ()) -> Any:
    """One signal, or a mapping of them, for a spec of this file."""
    torch.manual_seed(7)
    shape = (batch, *positions)
    if spec.startswith("label"):
        return torch.randint(0, 10, shape)
    if spec.startswith("scalar"):
        return torch.rand(shape) * 200
    if spec.startswith("vector"):
        return torch.randn(*shape, 7)
    present = torch.tensor([True, False, True, False, True])[:batch]
    return {
        "label": Signal(torch.randint(0, 10, shape), present=present),
        "time": torch.randint(0, 1000, shape),
        "text": torch.randn(*shape, 7),
    }


def close(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> bool:
    return torch.allclose(one, other, rtol=0, atol=tolerance)


def repeat(tree: Any, positions: int) -> Any:
    """The same signal at every position."""
    if isinstance(tree, dict):
        return {name: repeat(value, positions) for name, value in tree.items()}
    if isinstance(tree, Signal):
        return tree._replace(value=repeat(tree.value, positions))
    return tree[:, None].expand(tree.shape[0], positions, *tree.shape[1:])


# --- label, scalar, vector --------------------------------------------------------------------


def test_label_starts_as_published() -> None:
    module = encoder("label(classes=1000, nullable=True)", 64)
    assert module.table.std().item() == pytest.approx(0.02, rel=0.05)
    assert encoder("label(classes=1000, std=1.)", 64).table.std().item() == pytest.approx(
        1.0, rel=0.05
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_takes_every_integer(dtype: torch.dtype) -> None:
    module, label = encoder("label(classes=10)"), torch.tensor([[0, 9], [3, 3]])
    assert torch.equal(module(label.to(dtype)), module.table[label])
    assert module(label[:0]).shape == (0, 2, 256)


def test_scalar_is_an_mlp_of_the_standardised_number() -> None:
    module = encoder("scalar(mean=120., std=30., hidden=[16])", 8).double()
    value = torch.tensor([90.0, 123.4], dtype=torch.float64)
    unit = ((value - 120) / 30)[:, None]
    first = module.hidden[0]
    inner = nn.functional.silu(unit @ first.weight.T + first.bias)
    expected = inner @ module.proj.weight.T + module.proj.bias
    assert close(module(value), expected, 1e-12)
    assert close(module(torch.tensor([90, 150])), module(torch.tensor([90.0, 150.0])), 1e-12)


def test_scalar_is_standardised_before_it_is_rounded() -> None:
    module = encoder("scalar(mean=937., std=1.)", 8).bfloat16()
    assert torch.equal(module(torch.tensor([937.5])), module(torch.tensor([1000.5]) - 63))
    assert not torch.equal(module(torch.tensor([937.5])), module(torch.tensor([937.0])))


@pytest.mark.parametrize("spec", SINGLE)
def test_a_mask_is_kept_and_an_absent_sample_is_all_null(spec: str) -> None:
    module = stirred(encoder(spec))
    value = signals(spec, 2, (3,))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    out = module(Signal(value, mask=mask))
    assert torch.equal(out.mask, mask)
    assert torch.equal(out.value, module(value))
    absent = module(Signal(value, mask=mask, present=torch.tensor([True, False])))
    assert torch.equal(absent.mask, torch.tensor([[True, True, False], [True, True, True]]))
    assert torch.equal(absent.value[1], module.null.expand(3, -1))


@pytest.mark.parametrize("spec", SINGLE)
def test_drop_gives_the_null_in_training_alone(spec: str) -> None:
    module = stirred(encoder(spec[:-1] + ", drop=1.0)"))
    value = signals(spec)
    assert not torch.equal(module(value), module.null.expand(3, -1))
    assert torch.equal(module.train()(value), module.null.expand(3, -1))


@pytest.mark.parametrize(
    ("spec", "signal", "error", "text"),
    [
        (
            "label(classes=10)",
            torch.tensor([3, 10]),
            ConditionError,
            "label has the classes 0 to 9; got 3 to 10",
        ),
        (
            "label(classes=10)",
            torch.tensor([-1, 2]),
            ConditionError,
            "label has the classes 0 to 9; got -1 to 2; an absent label is "
            "Signal(label, present=...) for label(nullable=True)",
        ),
        (
            "label(classes=10)",
            torch.tensor([1.0]),
            ConditionError,
            "label takes integers; got torch.float32; continuous values go through scalar",
        ),
        (
            "label(classes=10)",
            torch.zeros(1, 2, 3, dtype=torch.long),
            ShapeError,
            "label takes one label per sample, (B,), or per position, (B, T); got (1, 2, 3)",
        ),
        (
            "label(classes=10)",
            "cat",
            ConditionError,
            "label takes one tensor, without an index; got str",
        ),
        (
            "label(classes=10)",
            Signal(torch.tensor([1]), index=torch.tensor([0])),
            ConditionError,
            "label takes one tensor, without an index; got a Signal with an index",
        ),
        (
            "scalar",
            torch.tensor([True]),
            ConditionError,
            "scalar takes real numbers; got torch.bool",
        ),
        (
            "scalar",
            torch.zeros(1, 2, 3),
            ShapeError,
            "scalar takes one number per sample, (B,), or per position, (B, T); got (1, 2, 3)",
        ),
        (
            "vector(features=384)",
            torch.zeros(2, 383),
            ShapeError,
            "vector takes vectors of features=384; got (2, 383)",
        ),
        (
            "vector(features=384)",
            torch.zeros(384),
            ShapeError,
            "vector takes one vector per sample, (B, 384), or per position, (B, T, 384); "
            "got (384,)",
        ),
        (
            "vector(features=4)",
            torch.zeros(2, 4, dtype=torch.long),
            ConditionError,
            "vector takes floating vectors; got torch.int64",
        ),
        (
            "vector(features=4)",
            Signal(torch.zeros(2, 3, 4), mask=torch.ones(2, 3)),
            ConditionError,
            "vector: Signal.mask is bool (B, T), one per position; "
            "got torch.float32 (2, 3) for an output (2, 3, 256)",
        ),
        (
            "vector(features=4)",
            Signal(torch.zeros(2, 4), mask=torch.ones(2, 4, dtype=torch.bool)),
            ConditionError,
            "vector: Signal.mask is bool (B, T), one per position; "
            "got torch.bool (2, 4) for an output (2, 256)",
        ),
    ],
)
def test_wrong_signals(spec: str, signal: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        encoder(spec)(signal)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("label", "label needs the option 'classes'"),
        ("label(classes=0)", "label: classes should be greater than or equal to 1; got 0"),
        ("vector", "vector needs the option 'features'"),
        ("scalar(std=0.)", "scalar: std should be greater than 0; got 0.0"),
        ("fuse", "fuse needs the option 'inputs'"),
        (
            "fuse(inputs={})",
            "fuse: inputs names at least one signal, as in {'time': timestep}",
        ),
        (
            "fuse(inputs={'a b': timestep})",
            "fuse: an input's name is a plain ASCII identifier; got 'a b'",
        ),
        (
            "fuse(inputs={'a.b': timestep})",
            "fuse: an input's name is a plain ASCII identifier; got 'a.b'",
        ),
        (
            "fuse(inputs={'type': timestep})",
            "fuse: torch keeps the name 'type' for itself; choose another",
        ),
        (
            "fuse(inputs={'time': tmestep})",
            "fuse: no component is called 'tmestep'; did you mean 'timestep'?",
        ),
        (
            "fuse(inputs={'time': timestep(dims=3)})",
            "timestep has no option 'dims'; did you mean 'dim'?",
        ),
        (
            "fuse(inputs={'time': timestep}, drop=0.1)",
            "fuse: drop > 0 needs an input with nullable=True: a dropped signal becomes its null",
        ),
        (
            "fuse(inputs={'time': timestep}, drop=1.5)",
            "fuse: drop should be less than or equal to 1; got 1.5",
        ),
        ("multi_condition", "multi_condition needs the option 'encoder'"),
    ],
)
def test_wrong_options(spec: str, text: str) -> None:
    with pytest.raises(SpecError) as caught:
        condmod.configure(spec)
    assert str(caught.value).splitlines()[0] == text


# --- fuse -------------------------------------------------------------------------------------


def test_concat_is_an_mlp_of_the_sorted_inputs() -> None:
    module = stirred(encoder(FUSIONS[2], 9)).double()
    condition = signals("fuse")
    together = torch.cat(
        [module.inputs[name](condition[name]) for name in ("label", "text", "time")], dim=-1
    )
    assert together.shape == (3, 5 + 4 + 6)
    assert module.hidden[0].weight.shape == (9, 15)
    inner = nn.functional.silu(module.hidden[0](together))
    assert close(module(condition), module.proj(inner), 1e-12)
    assert list(encoder(FUSIONS[3], 9).hidden) == []


@pytest.mark.parametrize("mode", ["sum", "concat", "gated"])
def test_the_order_of_the_inputs_means_nothing(mode: str) -> None:
    one = f"fuse(inputs={{'b': label(classes=3, dim=4), 'a': scalar(dim=4)}}, mode={mode!r}, dim=4)"
    two = f"fuse(inputs={{'a': scalar(dim=4), 'b': label(classes=3, dim=4)}}, mode={mode!r}, dim=4)"
    assert condmod.configure(one) == condmod.configure(two)
    first, second = encoder(one), encoder(two)
    assert list(first.state_dict()) == list(second.state_dict())
    a, b = torch.rand(2), torch.tensor([0, 2])
    assert torch.equal(first({"a": a, "b": b}), second({"b": b, "a": a}))


@pytest.mark.parametrize("spec", FUSIONS)
def test_a_global_signal_is_repeated_over_the_positions_of_the_others(spec: str) -> None:
    module = stirred(encoder(spec))
    batch = 3
    for positions in (1, batch, 5):
        condition = signals(spec, batch)
        mixed = {**condition, "text": repeat(condition["text"], positions)}
        out = module(mixed)
        assert out.shape == (batch, positions, module.out_dim)
        assert close(out, module(repeat(condition, positions)))
        assert close(out, module(condition)[:, None].expand_as(out))


def test_masks_meet() -> None:
    module = encoder("fuse(inputs={'a': scalar, 'b': scalar(nullable=True), 'c': scalar})")
    value = torch.rand(2, 3)
    a = torch.tensor([[True, True, False], [True, True, True]])
    b = torch.tensor([[True, False, True], [False, True, True]])
    both = {"a": Signal(value, mask=a), "b": Signal(value, mask=b), "c": torch.rand(2)}
    assert torch.equal(module(both).mask, a & b)
    one = {"a": Signal(value, mask=a), "b": value, "c": torch.rand(2)}
    assert torch.equal(module(one).mask, a)
    assert torch.equal(module(one).value, module({**one, "a": value}))
    absent = Signal(value, mask=b, present=torch.tensor([True, False]))
    assert torch.equal(module({**both, "b": absent}).mask, torch.stack([(a & b)[0], a[1]]))


def test_fusions_nest() -> None:
    spec = (
        "fuse(inputs={'time': timestep(dim=4), "
        "'who': fuse(inputs={'age': scalar(dim=4, nullable=True), 'label': label(classes=3)}, "
        "mode='concat', dim=4)}, dim=4)"
    )
    module = stirred(encoder(spec))
    age, label = torch.rand(2), torch.tensor([0, 2])
    condition = {"time": torch.tensor([1, 2]), "who": {"age": age, "label": label}}
    who = module.inputs["who"]
    expected = module.inputs["time"](condition["time"]) + who({"age": age, "label": label})
    assert close(module(condition), expected)
    wrapped = {**condition, "who": Signal(condition["who"])}
    assert torch.equal(module(wrapped), module(condition))
    with pytest.raises(ConditionError, match=r"missing \['age'\], surplus \[\]"):
        module({**condition, "who": {"label": label}})


@pytest.mark.parametrize(
    ("condition", "error", "text"),
    [
        (
            {"age": torch.rand(2)},
            ConditionError,
            "fuse takes a mapping with the keys ['age', 'label']; missing ['label'], surplus []",
        ),
        (
            {"age": torch.rand(2), "lable": torch.tensor([0, 1]), "x": torch.rand(2)},
            ConditionError,
            "fuse takes a mapping with the keys ['age', 'label']; "
            "missing ['label'], surplus ['lable', 'x']",
        ),
        (
            torch.rand(2),
            ConditionError,
            "fuse takes a mapping with the keys ['age', 'label']; got Tensor",
        ),
        (
            {"age": 3.0, "label": torch.tensor([0, 1])},
            ConditionError,
            "fuse: the input 'age' is a tensor with a batch, a Signal, or for a nested fuse a "
            "mapping; got float: 3.0",
        ),
        (
            {"age": torch.rand(1), "label": torch.tensor([0, 1])},
            ShapeError,
            "fuse: the inputs 'age' and 'label' have batches of 1 and 2; "
            "a single sample is not repeated",
        ),
        (
            {"age": torch.rand(2, 5), "label": torch.zeros(2, 4, dtype=torch.long)},
            ShapeError,
            "fuse: the inputs 'age' and 'label' have 5 and 4 positions; "
            "a signal has one value per sample, or as many as the others",
        ),
        (
            {"age": torch.rand(2, 1), "label": torch.zeros(2, 4, dtype=torch.long)},
            ShapeError,
            "fuse: the inputs 'age' and 'label' have 1 and 4 positions; "
            "a signal has one value per sample, or as many as the others",
        ),
        (
            Signal({"age": torch.rand(2)}, present=torch.tensor([True, False])),
            ConditionError,
            "fuse takes presence signal by signal; give it to its inputs",
        ),
        (
            Signal(
                {"age": torch.rand(2), "label": torch.tensor([0, 1])},
                mask=torch.ones(2, 1, dtype=torch.bool),
            ),
            ConditionError,
            "fuse takes masks signal by signal; give it to its inputs",
        ),
    ],
)
def test_wrong_mappings(condition: Any, error: type[Exception], text: str) -> None:
    module = encoder("fuse(inputs={'label': label(classes=3), 'age': scalar})")
    with pytest.raises(error) as caught:
        module(condition)
    assert str(caught.value) == text


def test_drop_is_joint_for_the_nullable_inputs_and_leaves_the_others() -> None:
    spec = (
        "fuse(inputs={'time': timestep(dim=4), 'a': scalar(nullable=True), "
        "'b': fuse(inputs={'c': scalar(nullable=True)})}, mode='sum', dim=4, drop=0.5)"
    )
    module = stirred(encoder(spec)).train()
    batch = 400
    condition = {
        "time": torch.arange(batch),
        "a": torch.rand(batch),
        "b": {"c": torch.rand(batch)},
    }
    time, a, b = (module.inputs[name] for name in ("time", "a", "b"))
    everything = time(condition["time"]) + a(condition["a"]) + b(condition["b"])
    nothing = time(condition["time"]) + a.null + b.inputs["c"].null
    out = module(condition)
    kept = torch.isclose(out, everything, atol=1e-5).all(-1)
    dropped = torch.isclose(out, nothing, atol=1e-5).all(-1)
    assert (kept ^ dropped).all()
    assert 140 < dropped.sum().item() < 260
    assert close(module.eval()(condition), everything, 1e-5)


def test_the_drop_of_one_input_is_independent() -> None:
    spec = (
        "fuse(inputs={'a': scalar(nullable=True, drop=0.5), "
        "'b': scalar(nullable=True, drop=0.5)}, dim=4)"
    )
    module = stirred(encoder(spec)).train()
    value = torch.rand(400)
    out = module({"a": value, "b": value})
    a, b = (module.inputs[name].eval() for name in "ab")
    counts = [
        torch.isclose(out, one + two, atol=1e-5).all(-1).sum().item()
        for one in (a(value), a.null)
        for two in (b(value), b.null)
    ]
    assert sum(counts) == 400
    assert all(60 < count < 140 for count in counts)


def test_presence_adds_to_the_joint_drop() -> None:
    spec = "fuse(inputs={'a': scalar(nullable=True)}, dim=4, drop=0.5)"
    module = stirred(encoder(spec)).train()
    absent = Signal(torch.full((50,), math.nan), present=torch.zeros(50, dtype=torch.bool))
    assert torch.equal(module({"a": absent}), module.inputs["a"].null.expand(50, -1))
    both = Signal(torch.rand(50), present=torch.ones(50, dtype=torch.bool))
    certain = stirred(encoder(spec.replace("0.5", "1.0"))).train()
    assert torch.equal(certain({"a": both}), certain.inputs["a"].null.expand(50, -1))
    wrong = Signal(torch.rand(50), present=torch.ones(1, dtype=torch.bool))
    with pytest.raises(ConditionError, match="one per sample"):
        module({"a": wrong})


@pytest.mark.parametrize("mode", ["sum", "concat", "gated"])
@pytest.mark.parametrize("here", [False, True])
def test_every_parameter_has_a_gradient_with_every_signal_absent_or_present(
    mode: str, here: bool
) -> None:
    spec = (
        "fuse(inputs={'time': timestep(dim=4, hidden=[4], nullable=True), "
        "'label': label(classes=3, nullable=True), 'age': scalar(nullable=True), "
        f"'text': vector(features=3, nullable=True)}}, mode={mode!r}, dim=4)"
    )
    module = modulator(f"multi_condition(encoder={spec})").train()
    present = torch.full((2,), here)
    values = {
        "time": torch.tensor([1, 2]),
        "label": torch.tensor([0, 2]) if here else torch.tensor([-1, 99]),
        "age": torch.tensor([1.0, 2.0]) if here else torch.tensor([math.nan, 2.0]),
        "text": torch.randn(2, 3) if here else torch.full((2, 3), math.inf),
    }
    condition = {name: Signal(value, present=present) for name, value in values.items()}
    module(torch.randn(2, 6), condition).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_dropping_fusion_compiles_in_training_once_for_every_pattern_of_presence() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = modulator(MODULATORS[1]).train()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for row in range(3):
        condition = signals("fuse")
        condition["label"] = condition["label"]._replace(present=torch.arange(3) == row)
        compiled(torch.randn(3, 4, 6), condition).sum().backward()
    assert counter.frame_count == 1
    assert all(parameter.grad is not None for parameter in module.parameters())


# --- multi_condition --------------------------------------------------------------------------


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_multi_condition_is_its_inner_modulator_on_the_encoded_signals(channel_dim: int) -> None:
    module = stirred(modulator(MODULATORS[0], channel_dim=channel_dim))
    x = torch.randn(3, 5, 6)
    condition = signals("fuse", 3, (5,))
    encoded = module.encoder(condition)
    if channel_dim == 1:
        x, encoded = x.movedim(-1, 1), encoded.movedim(-1, 1)
    assert torch.equal(module(x, condition), module.inner(x, encoded))
    sample = signals("fuse", 3)
    assert torch.equal(module(x, sample), module.inner(x, module.encoder(sample)))
    assert close(module(x, sample), module(x, repeat(sample, 5)))


def test_multi_condition_takes_masked_positions() -> None:
    module = modulator("multi_condition(encoder=fuse(inputs={'a': scalar, 'b': scalar}, dim=8))")
    value, x = torch.rand(2, 3), torch.randn(2, 3, 6)
    mask = torch.tensor([[True, True, False]] * 2)
    masked = module(x, {"a": Signal(value, mask=mask), "b": value})
    assert torch.equal(masked, module(x, {"a": value, "b": value}))


def test_an_identity_inner_starts_as_the_identity() -> None:
    x = torch.randn(3, 4, 6)
    assert torch.equal(modulator(MODULATORS[1])(x, signals("fuse")), x)


def test_multi_condition_refuses_a_condition_dim_and_says_its_place() -> None:
    with pytest.raises(SiteError, match=r"^multi_condition.* needs no condition_dim"):
        modulator(MODULATORS[0], condition_dim=8)
    module = modulator(MODULATORS[0], name="blocks.3")
    with pytest.raises(ShapeError, match=r"^multi_condition at 'blocks\.3': modulation"):
        module(torch.randn(3, 4, 6), signals("fuse", 3, (5,)))
