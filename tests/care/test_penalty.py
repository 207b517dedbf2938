"""The penalty of a model: what publications add to the loss for their modulators."""

import pytest
import torch
from torch import nn

import condmod
from condmod.errors import SiteError


def test_it_is_the_sum_of_squares_of_every_rho_of_cnaps():
    site = condmod.attach(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"*": "cnaps"}, condition_dim=4
    )
    rhos = [value for key, value in site.named_parameters() if key.endswith("_rho")]
    assert len(rhos) == 4
    for rho in rhos:
        nn.init.normal_(rho)
    penalty = condmod.penalty(site)
    assert penalty.shape == ()
    torch.testing.assert_close(penalty, sum(rho.square().sum() for rho in rhos))
    penalty.backward()
    for key, parameter in site.named_parameters():
        if key.endswith("_rho"):
            torch.testing.assert_close(parameter.grad, 2 * parameter)
        else:
            assert parameter.grad is None


def test_a_modulator_that_stands_twice_counts_once():
    bank = condmod.create_bank("cnaps", {"a": condmod.Site(8, 4)})
    nn.init.ones_(bank["a"].scale_rho)
    nn.init.zeros_(bank["a"].shift_rho)
    assert condmod.penalty(nn.ModuleList([bank, bank["a"]])) == 8


def test_a_model_without_one_has_a_penalty_of_zero():
    model = nn.Sequential(condmod.create("film", features=8, condition_dim=4))
    assert torch.equal(condmod.penalty(model), torch.zeros(()))
    assert torch.equal(condmod.penalty(nn.ReLU()), torch.zeros(()))
    assert condmod.penalty(model.to("meta")).is_meta


def test_what_others_call_a_penalty_is_not_counted():
    model = nn.Linear(2, 2)
    model.penalty = lambda: torch.ones(())
    assert condmod.penalty(model) == 0


def test_what_is_no_model_is_refused():
    with pytest.raises(SiteError) as caught:
        condmod.penalty(3)
    assert str(caught.value) == "a model is a torch.nn.Module; got 3"
