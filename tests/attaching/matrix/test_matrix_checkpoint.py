"""Activation checkpointing recomputes under the condition of the forward pass, whenever it does."""

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint

from condmod import ConditionError

# torch hides this of its own from users; a modulation is no leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
GROUP = "Activation checkpointing"


def scenarios(conditioned, x, c, call=None, base=None):
    """Every order of forward and backward passes, by name; each runs to its last backward pass."""
    call = conditioned if call is None else call
    base = conditioned.base if base is None else base

    def loss(condition):
        return call(x, condition=condition).square().sum()

    def inside():
        with conditioned.condition(c[0]):
            base(x).square().sum().backward()

    def after():
        loss(c[0]).backward()

    def two_forwards_one_backward():
        (loss(c[0]) + 2 * loss(c[1])).backward()

    def first_in_first_out():
        first, second = loss(c[0]), loss(c[1])
        first.backward()
        (2 * second).backward()

    def under_another_condition():
        first = loss(c[0])
        with conditioned.condition(c[1]):
            second = base(x).square().sum()
            first.backward()
            (2 * second).backward()

    def before_another_forward():
        first = loss(c[0])
        with conditioned.condition(c[1]):
            first.backward()
            second = base(x).square().sum()
        (2 * second).backward()

    def retained_graph():
        first = loss(c[0])
        first.backward(retain_graph=True)
        first.backward()

    def disabled():
        with conditioned.disabled():
            plain = base(x).square().sum()
        (plain + 2 * loss(c[0])).backward()

    def double_backward():
        (gradient,) = torch.autograd.grad(loss(c[0]), x, create_graph=True)
        (gradient.square().sum() + loss(c[1])).backward()

    steps = [inside, after, two_forwards_one_backward, first_in_first_out, under_another_condition]
    steps += [before_another_forward, retained_graph, disabled, double_backward]
    return {step.__name__: step for step in steps}


@pytest.fixture
def check(attached, gradients, is_clean, x, c):
    """Asserts that all scenarios but some give the gradients of the plain eager model."""

    def run(conditioned, without=(), **how):
        plain = attached()
        expected = scenarios(plain, x, c)
        for name, step in scenarios(conditioned, x, c, **how).items():
            if name in without:
                continue
            got, wanted = gradients(conditioned, step), gradients(plain, expected[name])
            torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"{name}: {text}")
            assert is_clean(conditioned), name

    return run


@pytest.fixture
def _compiling():
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):  # for retained_graph
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("checkpointing", "says"),
    [
        ("none", "No checkpointing"),
        ("blocks", "Each block under `checkpoint(block, x, use_reentrant=False)`"),
        ("nested", "Blocks under checkpoint, in a trunk under checkpoint"),
        ("offloaded", "Each block under checkpoint and its inputs under `save_on_cpu()`"),
    ],
)
def test_every_order_of_passes_has_the_right_gradients(cell, attached, check, checkpointing, says):
    check(attached(checkpointing))
    cell(GROUP, says)


@pytest.mark.usefixtures("_compiling")
@pytest.mark.parametrize(
    ("checkpointing", "says"),
    [
        ("none", "Compiled blocks without checkpointing"),
        ("blocks", "Compiled blocks, each under checkpoint"),
        ("nested", "Compiled blocks under nested checkpoints"),
    ],
)
def test_compiled_blocks_have_the_right_gradients(cell, attached, check, checkpointing, says):
    conditioned = attached(checkpointing)
    for block in conditioned.base.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    check(conditioned, without={"double_backward"})  # torch has none for compiled models
    cell(GROUP, says)


@pytest.mark.usefixtures("_compiling")
@pytest.mark.parametrize("checkpointing", ["blocks", "nested"])
def test_a_model_compiled_around_checkpoints_has_the_right_gradients(
    cell, attached, check, checkpointing
):
    conditioned = attached(checkpointing)
    check(
        conditioned,
        without={"double_backward"},
        call=torch.compile(conditioned, fullgraph=True, backend="aot_eager"),
        base=torch.compile(conditioned.base, fullgraph=True, backend="aot_eager"),
    )
    nested = "nested checkpoints" if checkpointing == "nested" else "checkpoints"
    cell(GROUP, f"The whole model compiled around {nested}")


class Twice(nn.Module):
    """Calls an attached model twice, each time with what follows it under one checkpoint."""

    def __init__(self, conditioned, checkpointed):
        super().__init__()
        self.conditioned = conditioned
        self.checkpointed = checkpointed
        torch.manual_seed(4)
        self.back = nn.Linear(3, 8)

    def section(self, x, condition):
        return self.back(self.conditioned(x, condition=condition).tanh())

    def forward(self, x, conditions):
        for condition in conditions:
            if self.checkpointed:
                x = checkpoint(self.section, x, condition, use_reentrant=False)
            else:
                x = self.section(x, condition)
        return x


@pytest.mark.parametrize("inner", ["none", "blocks"])
def test_a_checkpoint_around_calls_recomputes_them(
    cell, attached, gradients, is_clean, x, c, inner
):
    conditioned = attached(inner)
    plain, outer = Twice(conditioned, False), Twice(conditioned, True)
    expected = gradients(plain, lambda: plain(x, c[:2]).square().sum().backward())
    calls = []
    conditioned.base.register_forward_hook(lambda *_: calls.append(1))

    def under_another():
        loss = outer(x, c[:2]).square().sum()
        with conditioned.condition(c[2]):
            loss.backward()

    for step in (lambda: outer(x, c[:2]).square().sum().backward(), under_another):
        calls.clear()
        torch.testing.assert_close(gradients(outer, step), expected)
        assert len(calls) >= 3, "each ran twice; the last may stop where nothing more is needed"
        assert is_clean(conditioned)
    within = ", which checkpoints its blocks" if inner == "blocks" else ""
    cell(GROUP, f"`checkpoint` around `conditioned(x, condition=c)`{within}")


def test_two_attachments_are_recomputed_each_under_its_own(
    cell, attached, drawn, gradients, is_clean, x, c
):
    results = []
    for checkpointing in ("none", "nested"):
        first = attached(checkpointing)
        torch.manual_seed(6)
        second = drawn(first.base, {"blocks.*.norm": "dense_film"}, name="second")

        def step(first=first, second=second):
            with second.condition(c[1]):
                one = first(x, condition=c[0])
            with first.condition(c[2]), second.disabled():
                two = first.base(x)
                (one.square() + 2 * two.square()).sum().backward()

        both = nn.ModuleList([first, second])
        results.append(gradients(both, step))
        assert is_clean(first)
        assert is_clean(second)
    torch.testing.assert_close(*results)
    cell(GROUP, "Two attachments on one model, under nested checkpoints")


def test_reentrant_checkpointing_is_refused(cell, attached, is_clean, x, c):
    conditioned = attached("reentrant")
    loss = conditioned(x, condition=c[0]).sum()
    with pytest.raises(ConditionError) as caught:
        loss.backward()
    assert str(caught.value) == (
        "the site 'blocks.1.norm' lies inside reentrant activation checkpointing, which gives its "
        "modulation no gradient; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), "
        "in transformers activation_checkpointing_enable({'use_reentrant': False})"
    )
    assert is_clean(conditioned)
    with conditioned.disabled():
        conditioned.base(x).sum().backward()
    cell(
        GROUP,
        "Reentrant checkpointing, `use_reentrant=True`",
        refused="it would give the modulators no gradient, so the backward pass raises an error",
    )
