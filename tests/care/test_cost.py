"""What a component costs is counted, not declared."""

import pytest
import torch

import condmod
from condmod.care.cost import cost


@pytest.mark.parametrize(
    ("spec", "parameters", "shared", "passes"),
    [
        ("none", 0, 0, ()),
        ("film", 2 * 8 * 5, 0, ("addcmul",)),
        ("adaln", 2 * 8 * 5, 0, ("native_layer_norm", "addcmul")),
        ("adaln_single(parts=1)", 3 * 8, 3 * 8 * 5, ("native_layer_norm", "addcmul", "addcmul")),
        ("per_timestep(inner=film, encoder=timestep(dim=4, hidden=[6]))", 184, 0, ("addcmul",)),
        ("stylegan2", 8 * 5, 0, ("mul", "addcmul")),  # the layer itself is not counted
        ("tanh_gate", 1, 0, ("addcmul",)),
        ("vector(features=6)", 6 * 4 + 4, 0, None),
    ],
)
def test_parameters_and_passes_are_those_of_the_formula(spec, parameters, shared, passes):
    assert cost(spec, features=8, condition_dim=4) == (parameters, shared, passes)


def test_what_needs_another_sublayer_says_that_its_passes_are_unknown():
    assert cost("wavenet_gate", features=8, condition_dim=4).passes is None


def test_no_random_number_is_drawn():
    before = torch.get_rng_state()
    cost("dense_film", features=8, condition_dim=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_place_that_does_not_fit_is_an_error():
    with pytest.raises(condmod.SiteError, match="condition_dim equals features"):
        cost("adain", features=8, condition_dim=4)
