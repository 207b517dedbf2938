"""What training does around an attached model: precision, copies, failures, threads."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import condmod
from condmod import Signal

GROUP = "Training"


def test_eager(cell, attached, gradients, x, c):
    conditioned = attached()
    before = [parameter.clone() for parameter in conditioned.base.parameters()]
    assert not torch.allclose(conditioned(x, condition=c[0]), conditioned(x, condition=c[1]))
    optimiser = torch.optim.AdamW([p for p in conditioned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        losses.append(conditioned(x, condition=c[0]).square().mean())
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(list(conditioned.base.parameters()), before, rtol=0, atol=0)
    cell(GROUP, "Eager, forward, backward and optimiser; the frozen base keeps every bit")


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_autocast(cell, attached, gradients, x, c, checkpointing):
    conditioned = attached(checkpointing)
    expected = gradients(conditioned, lambda: conditioned(x, condition=c[0]).sin().sum().backward())

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            output = conditioned(x, condition=c[0])
        assert output.dtype == torch.bfloat16
        output.float().sin().sum().backward()

    got = gradients(conditioned, step)
    assert {gradient.dtype for gradient in got} == {torch.float32}
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() < 0.05 * other.norm() + 0.01
    under = ", under checkpoints" if checkpointing == "blocks" else ""
    cell(GROUP, f"`torch.autocast` to bfloat16, gradients in float32{under}")


def test_all_in_bfloat16(cell, attached, x, c):
    conditioned = attached().bfloat16()
    output = conditioned(x.bfloat16(), condition=c[0].bfloat16())
    expected = attached()(x, condition=c[0])
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() < 0.05 * expected.norm()
    with pytest.raises(condmod.ConditionError, match="convert one of them, or use autocast"):
        conditioned(x.bfloat16(), condition=c[0])
    cell(GROUP, "Base, bank and condition in bfloat16; a float32 condition is an error")


def test_gradient_accumulation(cell, attached, gradients, c):
    conditioned = attached("blocks")
    x, conditions = torch.randn(4, 4, 8), torch.cat([c[0], c[1]])
    trained = [p for p in conditioned.parameters() if p.requires_grad]
    conditioned(x, condition=conditions).square().sum().backward()
    expected = [p.grad.clone() for p in trained]
    conditioned.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        conditioned(x[part], condition=conditions[part]).square().sum().backward()
    torch.testing.assert_close([p.grad for p in trained], expected)
    cell(GROUP, "Gradients accumulated over parts of a batch")


def test_absent_conditions_leave_no_parameter_without_a_gradient(cell, attached, x):
    conditioned = attached(condition_dim=5, encoder="vector(features=6, nullable=True)")
    raw = Signal(torch.randn(2, 6), present=torch.tensor([False, False]))
    conditioned(x, condition=raw).square().sum().backward()
    assert all(p.grad is not None for p in conditioned.bank.parameters())
    cell(GROUP, "A batch in which every condition is absent: no parameter is unused")


@pytest.mark.parametrize(
    ("says", "make"),
    [
        ("`copy.deepcopy(conditioned)`", copy.deepcopy),
        ("`pickle`", lambda conditioned: pickle.loads(pickle.dumps(conditioned))),
        ("`torch.save` and `torch.load(..., weights_only=False)` of the module", None),
    ],
)
def test_copies_are_conditioned_and_independent(cell, attached, is_clean, x, c, says, make):
    conditioned = attached()

    def saved(module):
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    expected = conditioned(x, condition=c[0])
    with conditioned.condition(c[1]):  # a copy made meanwhile has no condition of its own
        duplicate = (make or saved)(conditioned)
    assert is_clean(duplicate)
    assert torch.equal(duplicate(x, condition=c[0]), expected)
    with duplicate.condition(c[0]):
        assert torch.equal(duplicate.base(x), expected)
        assert is_clean(conditioned)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.add_(0.1)
    assert torch.equal(conditioned(x, condition=c[0]), expected)
    assert not torch.allclose(duplicate(x, condition=c[0]), expected)
    assert type(duplicate.detach().blocks[0].norm) is nn.LayerNorm
    assert torch.equal(conditioned(x, condition=c[0]), expected)
    cell(GROUP, f"{says}: conditioned, and independent of the original")


def test_an_average_of_weights_is_conditioned(cell, attached, x, c):
    conditioned = attached()
    average = AveragedModel(conditioned, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    first = [parameter.clone() for parameter in conditioned.bank.parameters()]
    average.update_parameters(conditioned)
    assert torch.equal(average(x, condition=c[0]), conditioned(x, condition=c[0]))
    with torch.no_grad():
        for parameter in conditioned.bank.parameters():
            parameter.add_(1)
    average.update_parameters(conditioned)
    for old, new in zip(first, average.module.bank.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)
    assert not torch.allclose(average(x, condition=c[0]), average(x, condition=c[1]))
    expected = average(x, condition=c[0])
    with average.module.condition(c[0]):
        assert torch.equal(average(x), expected)
    cell(GROUP, "An EMA copy, `torch.optim.swa_utils.AveragedModel(conditioned)`")


def test_a_module_used_twice_is_conditioned_twice(cell, attached, net, gradients, x, c):
    class Repeating(net):
        def trunk(self, x):
            return super().trunk(super().trunk(x))

    results = []
    for checkpointing in ("none", "blocks"):
        conditioned = attached(checkpointing, net=Repeating)
        once = attached()
        with once.condition(c[0]):
            by_hand = once.base.head(once.base.trunk(once.base.trunk(x)))
        output = conditioned(x, condition=c[0])
        assert torch.equal(output, by_hand)
        results.append(gradients(conditioned, output.sin().sum().backward))
    torch.testing.assert_close(*results)
    cell(GROUP, "A module that the model calls twice in a forward pass: conditioned at each call")


def test_shared_weights_keep_their_own_modulators(cell, drawn, net, gradients, x, c):
    def build():
        torch.manual_seed(3)
        model = net(blocks=2)
        model.blocks[1].mlp[0].weight = model.blocks[0].mlp[0].weight
        return drawn(model, {"blocks.*.mlp.0": "film"}, freeze="none")

    conditioned = build()
    assert conditioned.base.blocks[1].mlp[0].weight is conditioned.base.blocks[0].mlp[0].weight
    untied = copy.deepcopy(conditioned)
    untied.base.blocks[1].mlp[0].weight = nn.Parameter(
        untied.base.blocks[0].mlp[0].weight.detach().clone()
    )
    assert torch.equal(conditioned(x, condition=c[0]), untied(x, condition=c[0]))
    for model in (conditioned, untied):
        model(x, condition=c[0]).sin().sum().backward()
    summed = sum(block.mlp[0].weight.grad for block in untied.base.blocks)
    torch.testing.assert_close(conditioned.base.blocks[0].mlp[0].weight.grad, summed)
    tied = net(blocks=2)
    tied.blocks[1] = tied.blocks[0]
    assert len(drawn(tied, {"blocks.*.norm": "film"}).plan) == 1
    cell(GROUP, "Weights shared by two modules: one site each; a module under two names: one site")


def test_changes_in_place_are_still_detected(cell, attached, x, c):
    conditioned = attached()
    for saved in (lambda: x * 1, lambda: x.exp()):  # exp saves its output
        with conditioned.condition(c[0]):
            h = saved()
            loss = (h * h).sum() + conditioned.base(h).sum()
        h.add_(1)
        with pytest.raises(RuntimeError) as caught:
            loss.backward()
        assert str(caught.value) == (
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation: torch.FloatTensor (2, 4, 8) is at version 1; expected version 0 instead"
        )
    cell(GROUP, "A saved tensor changed in place before the backward pass: still torch's error")


def test_in_place_operations_of_the_base_work(cell, drawn, gradients, x, c):
    results = []
    for inplace in (False, True):
        torch.manual_seed(3)
        parts = [nn.Linear(8, 8), nn.SiLU(inplace=inplace), nn.Linear(8, 8), nn.ReLU(inplace)]
        conditioned = drawn(nn.Sequential(*parts), {"0": "film", "2": "film"})
        results.append(
            gradients(
                conditioned,
                lambda one=conditioned: one(x, condition=c[0]).sin().sum().backward(),
            )
        )
    torch.testing.assert_close(*results)
    cell(GROUP, "In-place operations of the base, `nn.ReLU(inplace=True)` behind a site")


class Failing(torch.autograd.Function):
    """The identity, whose backward pass fails."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("backward failed")


@pytest.mark.parametrize("checkpointing", ["none", "blocks", "nested"])
def test_failures_leave_no_condition_behind(
    cell, attached, gradients, is_clean, x, c, checkpointing
):
    conditioned = attached(checkpointing)
    expected = gradients(conditioned, lambda: conditioned(x, condition=c[0]).sin().sum().backward())

    def fail_with(text):
        raise ArithmeticError(text)

    handle = conditioned.base.blocks[1].mlp.register_forward_hook(
        lambda *_: fail_with("forward failed")
    )
    with pytest.raises(ArithmeticError, match="forward failed"):
        conditioned(x, condition=c[1])
    handle.remove()
    assert is_clean(conditioned)
    with pytest.raises(ArithmeticError, match="inside"), conditioned.condition(c[1]):
        fail_with("inside")
    assert is_clean(conditioned)
    loss = conditioned(Failing.apply(x), condition=c[1]).sum()
    with pytest.raises(ArithmeticError, match="backward failed"):
        loss.backward()
    assert is_clean(conditioned)
    with pytest.raises(ArithmeticError, match="backward failed"), conditioned.condition(c[1]):
        conditioned.base(Failing.apply(x)).sum().backward()
    assert is_clean(conditioned)
    got = gradients(conditioned, lambda: conditioned(x, condition=c[0]).sin().sum().backward())
    torch.testing.assert_close(got, expected)
    under = {"none": "", "blocks": ", under checkpoints", "nested": ", under nested checkpoints"}
    cell(
        GROUP,
        "An error in a forward or backward pass or in the `with` body: nothing stays set"
        + under[checkpointing],
    )


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_hooks_around_a_condition_are_called(cell, attached, gradients, x, c, checkpointing):
    conditioned = attached(checkpointing)
    expected = gradients(conditioned, lambda: conditioned(x, condition=c[0]).sin().sum().backward())
    packed = []

    def offloaded():
        with save_on_cpu():
            loss = conditioned(x, condition=c[0]).sin().sum()
        loss.backward()

    def noted():
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: packed.append(tensor) or len(packed) - 1, lambda place: packed[place]
        ):
            opened = conditioned.condition(c[0])
            before = len(packed)
            with opened:
                loss = conditioned.base(x).sin().sum()
            assert len(packed) > before
        loss.backward()

    for step in (offloaded, noted):
        torch.testing.assert_close(gradients(conditioned, step), expected)
    under = ", over checkpoints" if checkpointing == "blocks" else ""
    cell(GROUP, f"Saved-tensor hooks such as `save_on_cpu()` around the condition{under}")


def test_hooks_inside_a_condition_hide_it_from_checkpoints(
    cell, attached, gradients, is_clean, x, c
):
    def step(conditioned):
        with conditioned.condition(c[0]), save_on_cpu():
            loss = conditioned.base(x).sin().sum()
        loss.backward()

    conditioned = attached()
    expected = gradients(conditioned, lambda: conditioned(x, condition=c[0]).sin().sum().backward())
    torch.testing.assert_close(gradients(conditioned, lambda: step(conditioned)), expected)
    cell(GROUP, "Saved-tensor hooks inside the condition")
    checkpointed = attached("blocks")
    with pytest.raises(condmod.ConditionError, match=r"'blocks\.1\.norm' has no condition"):
        step(checkpointed)
    assert is_clean(checkpointed)
    cell(
        GROUP,
        "Saved-tensor hooks inside the condition, around a whole model with checkpoints",
        refused="they hide the condition from what is recomputed after it was closed; open them "
        "first, or run the backward pass inside the condition",
    )


def in_thread(run):
    """Run in another thread, and give what it gives or raise what it raises."""
    outcome = []

    def catch():
        try:
            outcome.append((run(), None))
        except BaseException as error:  # noqa: BLE001  # raised below, in the test's thread
            outcome.append((None, error))

    thread = threading.Thread(target=catch)
    thread.start()
    thread.join()
    [(result, error)] = outcome
    if error is not None:
        raise error
    return result


def test_threads_have_their_own_conditions(cell, attached, is_clean, x, c):
    conditioned = attached("blocks")
    expected = [conditioned(x, condition=one) for one in c]
    barrier = threading.Barrier(len(c))
    results = [None] * len(c)

    def work(i):
        with conditioned.condition(c[i]):
            barrier.wait()  # all are open now
            outputs = []
            for _ in range(5):
                outputs.append(conditioned.base(x))
                barrier.wait()
        results[i] = [*outputs, *(conditioned(x, condition=c[i]) for _ in range(20))]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(c))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(output, wanted) for output in outputs)
    with conditioned.condition(c[0]):
        assert in_thread(lambda: is_clean(conditioned)), "another thread has none"
    cell(GROUP, "Threads that run one model at once, each under its own condition")


@pytest.mark.parametrize("checkpointing", ["none", "blocks", "nested"])
def test_a_backward_pass_in_another_thread(
    cell, attached, gradients, is_clean, x, c, checkpointing
):
    conditioned = attached(checkpointing)

    def step(run):
        losses = [conditioned(x, condition=one).square().sum() for one in c[:2]]
        with conditioned.condition(c[2]):
            for loss in losses:
                run(loss.backward)

    expected = gradients(conditioned, lambda: step(lambda backward: backward()))
    got = gradients(conditioned, lambda: step(in_thread))
    torch.testing.assert_close(got, expected)
    assert in_thread(lambda: is_clean(conditioned))
    if checkpointing == "nested":
        cell(
            GROUP, "A backward pass in another thread than its forward pass, as on several devices"
        )
