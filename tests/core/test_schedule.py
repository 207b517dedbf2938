"""A schedule: the modulations of a finite set of conditions, filled anew when a weight changes."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import condmod
from condmod import Site, schedule
from condmod.functional import ScaleShift
from condmod.schedule import Schedule
from condmod.trees import leaves

FUSED = "fuse(inputs={'time': timestep(dim=8), 'label': label(classes=5, nullable=True)})"
TIMES = torch.tensor([0.75, 0.0, 0.5, 0.25])
KEYS = {
    "time": TIMES,
    "label": condmod.Signal(torch.arange(5), present=torch.tensor([True, False])),
}
ASKED = {
    "time": torch.tensor([0.25, 0.0, 0.75]),
    "label": condmod.Signal(torch.tensor([4, 0, 2]), present=torch.tensor([True, False, True])),
}


def generator(spec: str = "adaln_zero") -> nn.Module:
    """An encoder of time and label, and a bank of two sites, with nothing at zero."""
    sites = {"a": Site(4, 6), "b": Site(10, 6, channel_dim=1)}
    both = nn.Sequential(condmod.create_encoder(FUSED, 6), condmod.create_bank(spec, sites))
    for parameter in both.parameters():
        nn.init.normal_(parameter)
    return both.eval()


def same(one: Any, other: Any) -> bool:
    """Whether two modulations are one tree of the same classes, with leaves equal to rounding."""
    assert list(one) == list(other)
    return all(
        type(one[name]) is type(other[name])
        and all(
            a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, 1e-5, 1e-5)
            for a, b in zip(leaves(one[name]), leaves(other[name]), strict=True)
        )
        for name in one
    )


class Passes(nn.Module):
    """What counts the rows that a generator is asked for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0
        self.train(inner.training)

    def forward(self, condition: Any) -> Any:
        self.calls += 1
        return self.inner(condition)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["adaln_zero", "film", "film(hidden=[8])", "edm2"])
def test_a_row_is_what_the_module_gives_for_its_condition(spec: str):
    module = generator(spec)
    table = Schedule(module, KEYS)
    assert table.rows == 4 * 5 * 2
    assert same(table(ASKED), module(ASKED))
    every = torch.cartesian_prod(torch.arange(4), torch.arange(5), torch.arange(2)).unbind(1)
    time, label, present = every
    asked = {"time": TIMES[time], "label": condmod.Signal(label, present=present.bool())}
    assert same(table(asked), module(asked))
    none = {"time": TIMES[:0], "label": condmod.Signal(label[:0], present=present[:0].bool())}
    assert same(table(none), module(none))


@torch.no_grad()
def test_a_lookup_generates_nothing():
    module = Passes(generator())
    table = Schedule(module, KEYS)
    with table:
        for _ in range(3):
            table(ASKED)
    table(ASKED)
    assert module.calls == 1


@torch.no_grad()
def test_one_tensor_is_a_key_and_an_attached_bank_a_module():
    film = condmod.create_bank("film", {"a": Site(4, 8)})
    times = nn.Sequential(condmod.create_encoder("timestep(dim=8)", 8), film).eval()
    assert same(Schedule(times, TIMES)(TIMES[2:]), times(TIMES[2:]))
    net = nn.Sequential(nn.Linear(3, 4)).eval()
    attached = condmod.attach(net, {"0": "film"}, encoder=FUSED, condition_dim=6).eval()
    assert same(Schedule(attached.bank, KEYS)(ASKED), attached.bank(ASKED))


@torch.no_grad()
def test_leaves_may_have_any_rank_and_several_dtypes():
    class Odd(nn.Module):
        def forward(self, c: Tensor) -> Any:
            wide = c[:, None, None] * torch.ones(2, 3)
            return {"a": [c, wide.double()], "b": (ScaleShift(wide, c[:, None]), wide[:, :0])}

    c = torch.tensor([2.0, 1.0])
    want, found = Odd()(c), Schedule(Odd().eval(), c)(c)
    for one, other in zip(leaves(found), leaves(want), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert isinstance(found["b"][0], ScaleShift)


def fused_step(module: nn.Module) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def scaled(module: nn.Module) -> dict[str, Tensor]:
    return {name: value * 2 for name, value in module.state_dict().items()}


def new_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 2


def data_in_place(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(2)


def in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module[1]["b"].proj.bias.add_(1)


def new_parameter(module: nn.Module) -> None:
    module[1]["b"].proj.bias = nn.Parameter(torch.ones(60))


def new_module(module: nn.Module) -> None:
    own = module[1]["b"].proj
    module[1]["b"].proj = nn.Sequential(own, nn.Tanh()).eval()


def parametrized(module: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(
        module[1]["b"].proj, "weight", nn.Tanh().eval(), unsafe=True
    ).eval()


def reset(module: nn.Module) -> None:
    nn.init.ones_(module[1]["b"].proj.weight)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a step of fused AdamW": fused_step,
    "p.data = ...": new_data,
    "p.data.mul_()": data_in_place,
    "load_state_dict": lambda module: module.load_state_dict(scaled(module)),
    "load_state_dict(assign=True)": lambda module: module.load_state_dict(
        scaled(module), assign=True
    ),
    "an operation in place": in_place,
    "another parameter": new_parameter,
    "no parameter": lambda module: module[1]["b"].proj.register_parameter("bias", None),
    "another module": new_module,
    "a parametrization": parametrized,
    "a new start": reset,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_outside_a_block_every_change_is_seen(change: Callable[[nn.Module], object]):
    module = generator()
    table = Schedule(module, KEYS)
    with torch.no_grad():
        before = table(ASKED)
        with torch.enable_grad():
            change(module)
        assert same(table(ASKED), module(ASKED))
        assert not same(table(ASKED), before)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_block_begins_with_a_comparison(change: Callable[[nn.Module], object]):
    module = generator()
    table = Schedule(module, KEYS)
    with torch.no_grad():
        with table:
            table(ASKED)
        with torch.enable_grad():
            change(module)
        with table:
            assert same(table(ASKED), module(ASKED))


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "p.data.mul_()"])
def test_inside_a_block_a_change_is_seen_by_its_signs(change: str):
    module = generator()
    table = Schedule(module, KEYS)
    with torch.no_grad(), table:
        table(ASKED)
        with torch.enable_grad():
            CHANGES[change](module)
        assert same(table(ASKED), module(ASKED))


@torch.no_grad()
def test_a_write_through_data_inside_a_block_counts_from_the_next_one_on():
    module = generator()
    table = Schedule(module, KEYS)
    with table:
        before = table(ASKED)
        data_in_place(module)
        assert same(table(ASKED), before)
        with table:
            assert same(table(ASKED), module(ASKED))


@torch.no_grad()
def test_new_data_that_could_lie_where_the_old_lay_is_seen():
    module = generator()
    table = Schedule(module, KEYS)
    bias = module[1]["b"].proj.bias
    with table:
        for value in range(4):
            bias.data = torch.empty(0)  # lets go of the memory, and the next allocation takes it
            bias.data = torch.full((60,), float(value))
            assert same(table(ASKED), module(ASKED))


@torch.no_grad()
def test_inside_a_block_nothing_is_compared(monkeypatch: pytest.MonkeyPatch):
    table = Schedule(generator(), KEYS)
    compared: list[int] = []
    equal = schedule._equal
    monkeypatch.setattr(schedule, "_equal", lambda a, b: compared.append(1) or equal(a, b))
    with table:
        begun = len(compared)
        assert begun == len(list(table.module.parameters()))
        table(ASKED)
        assert len(compared) == begun
    table(ASKED)
    assert len(compared) == 2 * begun


@torch.no_grad()
def test_a_module_of_another_dtype_and_autocast_fill_the_table_anew():
    module = generator()
    table = Schedule(module, KEYS)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(table(ASKED), module(ASKED))
        assert next(leaves(table(ASKED))).dtype == torch.bfloat16
    assert same(table(ASKED), module(ASKED))
    with table:
        module.to(torch.float64)
        assert same(table(ASKED), module(ASKED))
        assert next(leaves(table(ASKED))).dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_follows_its_own_module(copied: Any):
    table = Schedule(generator(), KEYS)
    twin = copied(table)
    in_place(table.module)
    with torch.no_grad():
        assert same(table(ASKED), table.module(ASKED))
        assert same(twin(ASKED), twin.module(ASKED))
        assert not same(table(ASKED), twin(ASKED))


@torch.no_grad()
def test_a_table_that_is_filled_anew_stays_where_it_is():
    module = generator()
    table = Schedule(module, KEYS)
    (before,) = table._tables.values()
    data_in_place(module)
    table(ASKED)
    (after,) = table._tables.values()
    assert before.data_ptr() == after.data_ptr()


@torch.no_grad()
def test_what_is_looked_up_is_a_copy_of_the_row():
    table = Schedule(generator(), KEYS)
    next(leaves(table(ASKED))).zero_()
    assert same(table(ASKED), table.module(ASKED))


def test_it_serves_modules_that_are_made_and_used_in_inference_mode():
    with torch.inference_mode():
        module = generator()
        table = Schedule(module, KEYS)
        with table:
            assert same(table(ASKED), module(ASKED))
        assert same(table(ASKED), module(ASKED))
        for parameter in module.parameters():
            parameter.mul_(2)
        assert same(table(ASKED), module(ASKED))
    with torch.no_grad():
        module[1]["b"].proj.bias = nn.Parameter(torch.ones(60))
        assert same(table(ASKED), module(ASKED))


def test_training_mode_and_gradients_are_refused():
    module = generator()
    table = Schedule(module, KEYS)
    with pytest.raises(condmod.ConditionError) as caught:
        table(ASKED)
    assert str(caught.value) == (
        "a schedule gives no gradients; look up under torch.no_grad(), or generate without"
    )
    told = (
        "a schedule's module is in eval mode, as in training it may draw at random; Sequential is "
        "not: call eval()"
    )
    module.train()
    with torch.no_grad():
        for call in (lambda: table(ASKED), table.__enter__, lambda: Schedule(module, KEYS)):
            with pytest.raises(condmod.ConditionError) as caught:
                call()
            assert str(caught.value) == told
    module.eval().requires_grad_(False)
    assert same(table(ASKED), module(ASKED))


BAD_LOOKUPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a value between two": (
        {"time": torch.tensor([0.0, 0.3, 9.0])},
        condmod.ConditionError,
        "the schedule has no time 0.30000001192092896; the nearest of its 4 is 0.25; build it with "
        "every value that is looked up, or generate without it",
    ),
    "a value beyond": (
        {"label": condmod.Signal(torch.tensor([0, 5, 1]), present=torch.ones(3).bool())},
        condmod.ConditionError,
        "the schedule has no label 5; the nearest of its 5 is 4; build it with every value that is "
        "looked up, or generate without it",
    ),
    "another dtype": (
        {"time": torch.tensor([0.0, 0.5, 0.25]).double()},
        condmod.ConditionError,
        "the schedule's 'time' is torch.float32 on cpu; got torch.float64 on cpu; convert the "
        "values",
    ),
    "another device": (
        {"time": torch.zeros(3, device="meta")},
        condmod.ConditionError,
        "the schedule's 'time' is torch.float32 on cpu; got torch.float32 on meta; convert the "
        "values",
    ),
    "other keys": (
        {"label": torch.arange(3)},
        condmod.ConditionError,
        "this schedule's keys are time, label, label.present; got time, label",
    ),
    "one value for all": (
        {"time": torch.tensor(0.5)},
        condmod.ShapeError,
        "a schedule is looked up by one value per sample, (B,); got 'time' ()",
    ),
    "two batches": (
        {"time": TIMES},
        condmod.ShapeError,
        "a schedule is looked up by one value per sample, (B,); got 'label' (3,)",
    ),
    "no tensor": (
        {"time": 0.5},
        condmod.ConditionError,
        "a condition is a tensor, a Signal, or a mapping of names to these; got float as 'time'",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize(("other", "error", "told"), BAD_LOOKUPS.values(), ids=BAD_LOOKUPS)
def test_what_the_schedule_has_not_is_refused(
    other: dict[str, Any], error: type[Exception], told: str
):
    with pytest.raises(error) as caught:
        Schedule(generator(), KEYS)({**ASKED, **other})
    assert str(caught.value) == told


@torch.no_grad()
def test_where_a_look_would_wait_for_the_device_a_missing_value_gives_nan(
    monkeypatch: pytest.MonkeyPatch,
):
    table = Schedule(generator(), KEYS)
    monkeypatch.setattr(schedule, "_may_wait", lambda _: False)
    found = table({**ASKED, "time": torch.tensor([0.25, 0.3, 0.75])})
    right = table(ASKED)
    for made, wanted in zip(leaves(found), leaves(right), strict=True):
        assert made[1].isnan().all()
        assert torch.equal(made[[0, 2]], wanted[[0, 2]])


class Fixed(nn.Module):
    """What gives the same, whatever it is asked."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made

    def forward(self, condition: Any) -> Any:
        return self.made


BAD_KEYS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "none": ({}, 0, condmod.ConditionError, "a schedule needs a key, the values of a condition"),
    "empty": (TIMES[:0], 0, condmod.ConditionError, "'condition' has not"),
    "NaN": ({"t": TIMES / 0}, 0, condmod.ConditionError, "'t' has not"),
    "a matrix": (TIMES[None], 0, condmod.ShapeError, r"\(n,\); got 'condition' \(1, 4\)"),
    "too few rows": (TIMES, torch.ones(3, 2), condmod.ShapeError, r"Fixed gave torch.float32 \(3,"),
    "no rows": (TIMES, torch.tensor(1.0), condmod.ShapeError, r"Fixed gave torch.float32 \(\)"),
    "integers": (TIMES, torch.ones(4).long(), condmod.ShapeError, r"gave torch.int64 \(4,\)"),
}


@pytest.mark.parametrize(("keys", "made", "error", "told"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_keys_and_modules_that_make_no_table_are_refused(
    keys: Any, made: Any, error: type[Exception], told: str
):
    with pytest.raises(error, match=told):
        Schedule(Fixed(made).eval(), keys)


def test_it_tells_its_memory_and_when_it_pays():
    module = generator()
    table = Schedule(module, {**KEYS, "time": torch.tensor([0.0, 0.0, 0.5])})
    width = 6 * (4 + 10)
    assert table.rows == 2 * 5 * 2
    assert table.table_bytes == (table.rows + 1) * width * 4  # one row of NaN
    assert table.kept_bytes == sum(p.nbytes for p in module.parameters())
    assert str(table) == (
        "schedule of 20 conditions (2 time x 5 label x 2 label.present): table 0.0 MiB, kept "
        "weights 0.0 MiB; pays once 20 conditions are looked up (counted: to fill it generates as "
        "many)"
    )


@torch.no_grad()
def test_modulations_that_are_looked_up_go_into_compiled_code():
    bank = condmod.create_bank("film", {"a": Site(4, 8)})
    module = nn.Sequential(condmod.create_encoder("timestep(dim=8)", 8), bank).eval()
    table, x = Schedule(module, TIMES), torch.randn(2, 5, 4)
    step = torch.compile(lambda x, made: bank["a"].modulate(x, made), backend="eager")
    whole = torch.compile(lambda x, t: bank["a"].modulate(x, table(t)["a"]), backend="eager")
    for _ in range(2):
        want = bank["a"].modulate(x, module(TIMES[:2])["a"])
        torch.testing.assert_close(step(x, table(TIMES[:2])["a"]), want)
        torch.testing.assert_close(whole(x, TIMES[:2]), want)
        bank["a"].proj.bias.data.add_(1)


@torch.no_grad()
def test_a_fill_that_fails_is_made_up_for_at_the_next_lookup():
    module = generator()
    table = Schedule(module, KEYS)
    for parameter in module.parameters():
        parameter.mul_(2)
    forward = module[0].forward

    def stopped(condition: Any) -> Any:
        raise KeyboardInterrupt

    module[0].forward = stopped
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            table(ASKED)
    module[0].forward = forward
    assert same(table(ASKED), module(ASKED))


@torch.no_grad()
def test_a_block_is_of_its_thread():
    module = generator()
    table, found = Schedule(module, KEYS), []

    def other() -> None:
        with torch.no_grad():
            found.append(table(ASKED))

    with table:
        next(module.parameters()).data.mul_(2)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert same(found[0], module(ASKED))


def test_inference_tensors_have_no_signs_and_are_compared():
    with torch.inference_mode():
        module = generator()
        table = Schedule(module, KEYS)
        with table:
            for parameter in module.parameters():
                parameter.mul_(2)
            assert same(table(ASKED), module(ASKED))
