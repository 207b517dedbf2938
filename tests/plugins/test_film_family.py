"""What the mechanisms of the FiLM family promise beside the laws."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from condmod import (
    ConditionError,
    ShapeError,
    Signal,
    Site,
    SiteError,
    SpecError,
    configure,
    create,
    create_bank,
)
from condmod.functional import ScaleShift, Shift


class HandwrittenFilmBlock(nn.Module):
    def __init__(self, features, condition_dim):
        super().__init__()
        self.conv = nn.Conv2d(features, features, 3, padding=1)
        self.norm = nn.BatchNorm2d(features, affine=False)
        self.film = nn.Linear(condition_dim, 2 * features)

    def forward(self, x, c):
        gamma, beta = self.film(c)[:, :, None, None].chunk(2, 1)
        return x + F.relu((1 + gamma) * self.norm(self.conv(x)) + beta)


def test_film_block_equals_the_handwritten_block_in_training_and_in_evaluation():
    by_hand = HandwrittenFilmBlock(8, 5)
    ours = create("film_block", features=8, condition_dim=5, channel_dim=1)
    ours.proj.load_state_dict(by_hand.film.state_dict())
    for _ in range(3):
        x, c = torch.randn(4, 8, 6, 6), torch.randn(4, 5)
        torch.testing.assert_close(ours(x, c, by_hand.conv), by_hand(x, c))
    for statistics in ("running_mean", "running_var", "num_batches_tracked"):
        ran, by_torch = getattr(ours.norm, statistics), getattr(by_hand.norm, statistics)
        torch.testing.assert_close(ran, by_torch)
        assert ran.any()
    ours.eval(), by_hand.eval()
    torch.testing.assert_close(ours(x[:1], c[:1], by_hand.conv), by_hand(x[:1], c[:1]))


def test_film_block_is_drawn_kaiming_uniform_with_torch_s_bias():
    ours = create("film_block", features=256, condition_dim=200)
    bound, of_bias = (6 / 200) ** 0.5, 200**-0.5
    assert 0.99 * bound < ours.proj.weight.abs().max() <= bound
    assert abs(ours.proj.weight.std().item() - bound / 3**0.5) < 2e-3
    assert 0.95 * of_bias < ours.proj.bias.abs().max() <= of_bias


def test_film_block_forgets_its_statistics_when_it_is_reset():
    ours = create("film_block", features=8, condition_dim=5)
    ours(torch.randn(4, 6, 8) + 3, torch.randn(4, 5), torch.sin)
    assert ours.norm.running_mean.any()
    ours.reset_parameters()
    assert not ours.norm.running_mean.any()
    assert torch.equal(ours.norm.running_var, torch.ones(8))
    assert ours.norm.num_batches_tracked == 0


def test_film_block_rounds_once_in_bfloat16():
    ours = create("film_block", features=16, condition_dim=5).eval()
    x, c = torch.randn(64, 16).bfloat16(), torch.randn(64, 5).bfloat16()
    low = copy.deepcopy(ours).bfloat16()
    (modulation,) = low.generate(c)
    y = x.sin()
    wide = ScaleShift(*(leaf.float() for leaf in modulation))
    want = ours.exit(x.float(), y.float(), wide, None).bfloat16()
    assert torch.equal(low.exit(x, y, modulation, None), want)


def test_film_block_refuses_a_sublayer_that_changes_the_width():
    ours = create("film_block", features=4, condition_dim=8, name="blocks.3")
    with pytest.raises(ShapeError) as caught:
        ours(torch.randn(2, 5, 4), torch.randn(2, 8), nn.Linear(4, 8))
    assert str(caught.value) == (
        "the sublayer turned features (2, 5, 4) into (2, 5, 8) in film_block at 'blocks.3'; "
        "a residual needs equal shapes"
    )


def test_film_block_checks_the_channels_before_the_sublayer_sees_them():
    ours = create("film_block", features=4, condition_dim=8, name="blocks.3")
    (modulation,) = ours.generate(torch.randn(2, 8))
    with pytest.raises(ShapeError) as caught:
        ours.enter(torch.randn(2, 5, 3), modulation, None)
    assert str(caught.value) == (
        "film_block at 'blocks.3' takes features with 4 channels at dim -1; got (2, 5, 3)"
    )


@pytest.mark.parametrize(("spec", "sublayers"), [("film_block", [torch.sin]), ("audio_film", [])])
def test_batch_statistics_of_one_element_are_refused_in_training_alone(spec, sublayers):
    ours = create(spec, features=4, condition_dim=8, name="blocks.3")
    x, c = torch.randn(1, 4), torch.randn(1, 8)
    with pytest.raises(ShapeError) as caught:
        ours(x, c, *sublayers)
    assert str(caught.value) == (
        "batch norm averages over more than one element; features (1, 4) give it 1 in "
        f"{spec} at 'blocks.3'"
    )
    assert ours.eval()(x, c, *sublayers).shape == (1, 4)


def test_film_block_refuses_an_identity_that_a_sigmoid_never_reaches():
    with pytest.raises(SpecError) as caught:
        configure("film_block(scale='sigmoid', init='identity')")
    assert str(caught.value) == (
        "film_block: init='identity' needs a scale of 1, which a sigmoid never reaches\n"
        "  film_block(scale='sigmoid', init='identity')\n"
        "  ^^^^^^^^^^"
    )


@pytest.mark.parametrize("scale", ["raw", "one_plus", "exp", "one_plus_tanh"])
def test_film_block_starts_as_its_neutral_pass_in_every_form_that_reaches_it(scale):
    spec = f"film_block(scale='{scale}', init='identity')"
    ours = create(spec, features=4, condition_dim=8).eval()
    x, c = torch.randn(2, 5, 4), torch.randn(2, 8)
    assert torch.equal(ours(x, c, torch.sin), x + ours.norm(x.sin()).relu())


def test_rt1_film_equals_two_layers_that_start_at_zero():
    multiply, add = nn.Linear(5, 8), nn.Linear(5, 8)
    ours = create("rt1_film", features=8, condition_dim=5)
    x, c = torch.randn(2, 6, 6, 8), torch.randn(2, 5)
    assert torch.equal(ours(x, c), x)
    with torch.no_grad():
        ours.proj.weight.copy_(torch.cat([multiply.weight, add.weight]))
        ours.proj.bias.copy_(torch.cat([multiply.bias, add.bias]))
    want = (1 + multiply(c)[:, None, None]) * x + add(c)[:, None, None]
    torch.testing.assert_close(ours(x, c), want)


def test_diffusion_policy_film_adds_and_scales_only_where_it_is_told_to():
    x, c = torch.randn(2, 8, 6), torch.randn(2, 5)
    ours = create("diffusion_policy_film", features=8, condition_dim=5, channel_dim=1)
    assert isinstance(ours.generate(c), Shift)
    assert ours.proj.weight.shape == (8, 5)
    torch.testing.assert_close(ours(x, c), x + ours.proj(F.mish(c))[:, :, None])
    spec = "diffusion_policy_film(cond_predict_scale=True)"
    ours = create(spec, features=8, condition_dim=5, channel_dim=1)
    assert isinstance(ours.generate(c), ScaleShift)
    scale, shift = ours.proj(F.mish(c)).reshape(2, 2, 8, 1).unbind(1)
    torch.testing.assert_close(ours(x, c), scale * x + shift)


def test_t5_film_has_a_weight_for_the_norm_and_no_bias():
    ours = create("t5_film", features=8, condition_dim=32)
    shapes = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    assert shapes == {"norm.weight": (8,), "proj.weight": (16, 32)}
    assert torch.equal(ours.norm.weight, torch.ones(8))
    assert 0.95 * 32**-0.5 < ours.proj.weight.abs().max() <= 32**-0.5


def test_t5_film_takes_no_mean_away():
    ours = create("t5_film(init='identity')", features=8, condition_dim=32)
    x = torch.full((2, 8), 3.0)
    torch.testing.assert_close(ours(x, torch.randn(2, 32)), torch.ones(2, 8))


def test_audio_film_uses_running_statistics_in_evaluation():
    ours = create("audio_film(init='identity')", features=4, condition_dim=8, channel_dim=1)
    by_torch = nn.BatchNorm1d(4, affine=False)
    for _ in range(3):
        x = 2 * torch.randn(4, 4, 50) + 1
        torch.testing.assert_close(ours(x, torch.randn(4, 8)), by_torch(x))
    ours.eval(), by_torch.eval()
    alone = torch.randn(1, 4, 1)
    torch.testing.assert_close(ours(alone, torch.randn(1, 8)), by_torch(alone))


def test_audio_film_without_batch_norm_is_film_and_has_no_statistics():
    ours = create("audio_film(batch_norm=False)", features=4, condition_dim=8)
    film = create("film", features=4, condition_dim=8)
    film.load_state_dict(ours.state_dict(), strict=True)
    x, c = torch.randn(3, 5, 4), torch.randn(3, 8)
    assert torch.equal(ours(x, c), film(x, c))


SITES = {"blocks.0": Site(64, 128), "blocks.1": Site(64, 128)}


def test_cnaps_draws_small_factors_which_start_equal_for_scale_and_shift():
    bank = create_bank("cnaps", {"wide": Site(4096, 2)})
    rho = bank["wide"].scale_rho
    assert abs(rho.std().item() - 1e-3) < 5e-5
    assert abs(rho.mean().item()) < 1e-4
    assert torch.equal(bank["wide"].shift_rho, rho)
    assert bank["wide"].shift_rho is not rho


def test_cnaps_gives_its_penalty_for_the_loss():
    ours = create_bank("cnaps", SITES)["blocks.0"]
    with torch.no_grad():
        ours.scale_rho.fill_(0.5)
        ours.shift_rho.fill_(0.25)
    penalty = ours.penalty()
    assert penalty.item() == 64 * (0.25 + 0.0625)
    penalty.backward()
    assert torch.equal(ours.scale_rho.grad, torch.ones(64))
    assert torch.equal(ours.shift_rho.grad, torch.full((64,), 0.5))


def test_cnaps_shares_its_first_layer_and_nothing_else():
    bank = create_bank("cnaps", SITES)
    shared = [name for name in bank.state_dict() if name.startswith("shared.")]
    assert shared == ["shared.layer.weight", "shared.layer.bias"]
    one, other = (bank[name].scale[0].weight for name in SITES)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (
            {"a": Site(64, 128), "b": Site(32, 128)},
            "cnaps has one trunk for all sites of a bank, whose features are thus equal; "
            "got 64 at 'a' and 32 at 'b': make a bank for each size",
        ),
        (
            {"a": Site(64, 128), "b": Site(64, 12)},
            "cnaps has one trunk for all sites of a bank, whose condition_dim are thus equal; "
            "got 128 at 'a' and 12 at 'b': make a bank for each size",
        ),
        ({"a": Site(64)}, "cnaps at 'a' needs condition_dim, the width of its condition"),
    ],
)
def test_cnaps_says_which_sites_cannot_share(sites, message):
    with pytest.raises(SiteError) as caught:
        create_bank("cnaps", sites)
    assert str(caught.value) == message


def test_cnaps_takes_a_task_and_nothing_per_position():
    bank = create_bank("cnaps", SITES)
    with pytest.raises(ShapeError) as caught:
        bank(torch.randn(2, 7, 128))
    assert str(caught.value) == (
        "cnaps at 'blocks.0' takes a global condition (B, condition_dim=128) for features "
        "(B, ..., features=64); got a condition (2, 7, 128)"
    )


def encoded():
    return torch.randn(2, 8, 6, 6), torch.randn(2, 5, 6, 6)


def test_cft_gives_the_features_back_at_strength_0_and_grows_with_it():
    ours = create("cft", features=8, condition_dim=5, channel_dim=1)
    x, c = encoded()
    full = ours(x, c) - x
    assert full.abs().max() > 0.1
    ours.set_strength(0.25)
    torch.testing.assert_close(ours(x, c) - x, 0.25 * full)
    ours.set_strength(0)
    assert torch.equal(ours(x, c), x)
    ours.reset_parameters()
    assert ours.strength == 1


def test_cft_applies_its_strength_to_modulations_that_were_kept():
    ours = create("cft", features=8, condition_dim=5, channel_dim=1)
    x, c = encoded()
    kept = ours.generate(c)
    ours.set_strength(0)
    assert torch.equal(ours.modulate(x, kept), x)


def test_a_compiled_cft_takes_another_strength_without_another_graph():
    ours = create("cft(strength=0.5)", features=8, condition_dim=5, channel_dim=1)
    counter = CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    x, c = encoded()
    outputs = []
    for strength in (0.5, 1.0, 0.0, 0.3):
        ours.set_strength(strength)
        outputs.append(compiled(x, c))
        torch.testing.assert_close(outputs[-1], ours(x, c))
    assert torch.equal(outputs[2], x)
    assert counter.frame_count == 1


def test_cft_keeps_its_strength_out_of_state_dicts_and_through_them():
    ours = create("cft(strength=0.5)", features=8, condition_dim=5)
    assert not [name for name in ours.state_dict() if "strength" in name]
    with torch.device("meta"):
        assigned, emptied = (create(ours.config, ours.site) for _ in range(2))
    assigned.load_state_dict(ours.state_dict(), assign=True)
    assert assigned.strength == 0.5
    emptied.to_empty(device="cpu")
    emptied.strength.fill_(float("nan"))  # what the memory may hold
    emptied.load_state_dict(ours.state_dict())
    assert emptied.strength == 0.5
    twin = copy.deepcopy(ours)
    twin.set_strength(0.75)
    twin.load_state_dict(ours.state_dict())
    assert (twin.strength, ours.strength) == (0.75, 0.5)


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_cft_refuses_a_strength_beyond_its_range(strength):
    ours = create("cft", features=8, condition_dim=5, name="fuse.32")
    with pytest.raises(ConditionError) as caught:
        ours.set_strength(strength)
    assert str(caught.value) == (
        f"cft at 'fuse.32': strength is from 0 (the features themselves) to 1; got {strength}"
    )
    assert ours.strength == 1


def test_cft_refuses_such_a_strength_in_a_spec():
    with pytest.raises(SpecError) as caught:
        configure("cft(strength=1.5)")
    assert str(caught.value) == (
        "cft: strength should be less than or equal to 1; got 1.5\n"
        "  cft(strength=1.5)\n"
        "               ^^^"
    )


def test_gnn_film_gives_shift_before_scale():
    ours = create("gnn_film(activation='none')", features=4, condition_dim=3)
    with torch.no_grad():
        ours.proj.weight.zero_()
        ours.proj.bias.copy_(torch.tensor([5.0] * 4 + [2.0] * 4))
    x = torch.randn(1, 6, 4)
    assert torch.equal(ours(x, torch.randn(1, 3)), 2 * x + 5)


def test_gnn_film_reads_the_target_node_of_every_edge():
    ours = create("gnn_film", features=4, condition_dim=3)
    nodes, targets = torch.randn(1, 5, 3), torch.tensor([[0, 4, 4, 2]])
    messages = torch.randn(1, 4, 4)
    beta, gamma = ours.proj(nodes).chunk(2, -1)
    want = (gamma[:, targets[0]] * messages + beta[:, targets[0]]).relu()
    got = ours(messages, Signal(nodes, index=targets))
    torch.testing.assert_close(got, want)
    assert (got == 0).any()
