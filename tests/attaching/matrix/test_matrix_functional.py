"""torch.func: other parameters, gradients as functions, vectorised conditions."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

GROUP = "torch.func"


@pytest.fixture
def parameters():
    """The bank's parameters by the names that they have in the conditioned model."""
    return lambda conditioned: {
        f"bank.{name}": value.detach() for name, value in conditioned.bank.named_parameters()
    }


def test_functional_call_takes_other_parameters(cell, attached, parameters, is_clean, x, c):
    conditioned = attached()
    expected = conditioned(x, condition=c[0])
    others = {name: value + 0.1 for name, value in parameters(conditioned).items()}
    got = functional_call(conditioned, others, (x,), {"condition": c[0]})
    assert torch.equal(conditioned(x, condition=c[0]), expected)
    with torch.no_grad():
        for value in conditioned.bank.parameters():
            value.add_(0.1)
    assert torch.equal(got, conditioned(x, condition=c[0]))
    assert is_clean(conditioned)
    cell(GROUP, "`functional_call(conditioned, parameters, (x,), {'condition': c})`")


def test_grad_over_functional_call(cell, attached, parameters, gradients, x, c):
    conditioned = attached()

    def loss(values):
        return functional_call(conditioned, values, (x,), {"condition": c[0]}).sin().sum()

    got = grad(loss)(parameters(conditioned))
    _, *expected = gradients(
        conditioned, lambda: conditioned(x, condition=c[0]).sin().sum().backward()
    )
    torch.testing.assert_close(list(got.values()), expected)
    cell(GROUP, "`grad` over `functional_call`")


def test_gradients_of_every_sample(cell, attached, parameters, x, c):
    conditioned = attached()

    def loss(values, x, condition):
        given = {"condition": condition[None]}
        return functional_call(conditioned, values, (x[None],), given).sin().sum()

    got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters(conditioned), x, c[0])
    for i in range(2):
        conditioned.zero_grad()
        conditioned(x[i : i + 1], condition=c[0, i : i + 1]).sin().sum().backward()
        for name, value in conditioned.bank.named_parameters():
            torch.testing.assert_close(got[f"bank.{name}"][i], value.grad)
    cell(GROUP, "`vmap` over `grad`: gradients of every sample")


def test_vmap_over_samples_conditions_and_strengths(cell, attached, is_clean, x, c):
    conditioned = attached()
    strengths = torch.tensor([0.0, 0.5])
    got = vmap(lambda x, c, s: conditioned(x[None], condition=c[None], strength=s)[0])(
        x, c[0], strengths
    )
    for i in range(2):
        one = conditioned(x[i : i + 1], condition=c[0, i : i + 1], strength=strengths[i])
        torch.testing.assert_close(got[i : i + 1], one)
    got = vmap(lambda c: conditioned(x, condition=c))(c)
    torch.testing.assert_close(got, torch.stack([conditioned(x, condition=one) for one in c]))
    with conditioned.condition(c[0]):
        got = vmap(conditioned.base)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(got[1], conditioned(2 * x, condition=c[0]))
    assert is_clean(conditioned)
    cell(
        GROUP, "`vmap` over features, conditions and strengths, and under a condition set around it"
    )


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own forward mode
def test_directional_derivatives_and_jacobians(cell, attached, x, c):
    conditioned = attached()

    def run(condition):
        return conditioned(x, condition=condition)

    tangent = torch.randn_like(c[0])
    _, forward = jvp(run, (c[0],), (tangent,))
    torch.testing.assert_close(forward, (jacrev(run)(c[0]) * tangent).sum((-1, -2)))
    with conditioned.condition(c[0]):
        _, under = jvp(conditioned.base, (x.detach(),), (torch.ones_like(x),))
    _, expected = jvp(
        lambda x: conditioned(x, condition=c[0]), (x.detach(),), (torch.ones_like(x),)
    )
    torch.testing.assert_close(under, expected)
    cell(GROUP, "`jvp`, also under a condition set around it, and `jacrev`")


def test_grad_under_a_condition_is_refused_by_torch(cell, attached, is_clean, x, c):
    conditioned = attached()
    with (
        pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"),
        conditioned.condition(c[0]),
    ):
        grad(lambda x: conditioned.base(x).sum())(x)
    assert is_clean(conditioned)
    cell(
        GROUP,
        "`grad`, `vjp` or `jacrev` with the condition set around it",
        refused="torch's own: these transforms run under no saved-tensor hooks; call "
        "`conditioned(x, condition=c)` inside the transformed function",
    )


def test_checkpoints_inside_grad_are_refused_by_torch(cell, attached, x, c):
    with pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):
        grad(lambda x: checkpoint(torch.sin, x, use_reentrant=False).sum())(x)  # without attach
    conditioned = attached("blocks")
    with pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):
        grad(lambda x: conditioned(x, condition=c[0]).sum())(x)
    cell(
        GROUP,
        "Checkpoints inside `grad`, `vjp` or `jacrev`",
        refused="torch's own, attached or not: checkpoints are saved-tensor hooks",
    )
