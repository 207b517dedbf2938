"""Norms whose statistics span positions or samples, EDM2's modulation, and ADM's other form."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from condmod import (
    CheckpointError,
    ConditionError,
    ShapeError,
    Signal,
    SiteError,
    SpecError,
    configure,
    create,
)
from condmod.functional import ScaleShift

CLASSES = ("conditional_batch_norm", "conditional_instance_norm")
BATCH_NORMS = ("conditional_batch_norm(classes=3)", "biggan_batch_norm")


def build(spec, features=6, condition_dim=4, channel_dim=1):
    torch.manual_seed(0)
    width = None if spec.startswith("conditional") else condition_dim
    return create(
        spec, features=features, condition_dim=width, channel_dim=channel_dim, name="blocks.3"
    )


def condition(spec, batch):
    return torch.arange(batch) % 3 if spec.startswith("conditional") else torch.randn(batch, 4)


@pytest.mark.parametrize(
    "spec",
    [
        *BATCH_NORMS,
        "adain1d",
        "conditional_instance_norm(classes=3)",
        "modern_batch_norm",
        "edm2",
        "ada_group_norm(groups=3, use_scale_shift_norm=False)",
    ],
)
def test_half_precision_features_are_modulated_in_float32_and_rounded_once(spec):
    ours = build(spec)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter))
    x, c = torch.randn(4, 6, 50).bfloat16(), condition(spec, 4)
    y = ours(x, c)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ours(x.float(), c).bfloat16())


# --- adain ------------------------------------------------------------------------------------


def test_adain_gives_each_channel_the_mean_and_spread_of_the_style():
    adain = build("adain(eps=1e-12)", condition_dim=6).double()
    x, style = torch.randn(2, 6, 5, 4).double() * 7 + 3, torch.randn(2, 6, 9).double()
    y = adain(x, style)
    torch.testing.assert_close(y.mean((2, 3)), style.mean(2))
    torch.testing.assert_close(y.var((2, 3)), style.var(2))


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_adain_of_a_style_equal_to_the_features_gives_them_back(channel_dim):
    adain = build("adain", condition_dim=6, channel_dim=channel_dim)
    x = torch.randn(2, 6, 6)
    torch.testing.assert_close(adain(x, x), x)
    assert not adain.state_dict()


def test_adain_keeps_the_statistics_of_a_half_precision_style_in_float32():
    adain = build("adain", condition_dim=6)
    style = torch.randn(2, 6, 100).bfloat16()
    exact = adain.generate(style.float())
    for leaf, want in zip(adain.generate(style), exact, strict=True):
        assert torch.equal(leaf, want)


def test_styles_mix_by_their_statistics():
    adain = build("adain", condition_dim=6)
    x, one, other = torch.randn(2, 6, 5), torch.randn(2, 6, 4), torch.randn(2, 6, 3)
    leaves = zip(adain.generate(one), adain.generate(other), strict=True)
    mixed = ScaleShift(*(torch.lerp(a, b, 0.25) for a, b in leaves))
    want = torch.lerp(adain(x, one), adain(x, other), 0.25)
    torch.testing.assert_close(adain.modulate(x, mixed), want)


def test_adain_refuses_a_site_whose_condition_has_other_channels():
    with pytest.raises(SiteError) as caught:
        build("adain", condition_dim=4)
    assert str(caught.value) == (
        "adain at 'blocks.3' takes the mean and spread of each channel from the style's: "
        "condition_dim equals features; got features=6 and condition_dim=4"
    )


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 4), (6,), (2, 4, 6), (2, 6, 0)])
def test_adain_refuses_a_style_of_another_shape(shape):
    with pytest.raises(ShapeError) as caught:
        build("adain", condition_dim=6)(torch.randn(2, 6, 5), torch.randn(shape))
    assert str(caught.value) == (
        "adain at 'blocks.3' takes a map (B, condition_dim=6, *sides) of one position or more; got "
        f"a condition {shape}"
    )


def test_adain_refuses_a_style_of_one_position():
    with pytest.raises(ShapeError) as caught:
        build("adain", condition_dim=6)(torch.randn(2, 6, 5), torch.randn(2, 6, 1))
    assert str(caught.value) == (
        "adain at 'blocks.3' takes the spread of a style over more than one position; got a "
        "condition (2, 6, 1)"
    )


def test_adain_names_the_layout_of_a_style_with_channels_last():
    with pytest.raises(ShapeError, match=re.escape("a map (B, *sides, condition_dim=6) of one")):
        build("adain", condition_dim=6, channel_dim=-1)(torch.randn(2, 5, 6), torch.randn(2, 6, 5))


def test_adain_refuses_features_of_one_position():
    with pytest.raises(ShapeError) as caught:
        build("adain", condition_dim=6)(torch.randn(2, 6, 1), torch.randn(2, 6, 4))
    assert str(caught.value) == (
        "a spread is over more than one position; got features (2, 6, 1) in adain at 'blocks.3'"
    )


def test_adain_refuses_a_style_of_another_batch():
    adain = build("adain", condition_dim=6)
    with pytest.raises(ShapeError) as error:
        adain(torch.randn(2, 6, 5), torch.randn(1, 6, 5))
    assert str(error.value) == (
        "adain at 'blocks.3' takes a map (B, condition_dim=6, *sides) for features (B, "
        "features=6, ...); got features (2, 6, 5) and a condition (1, 6, 5)"
    )


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (torch.ones(2, 6, 4, dtype=torch.int64), "torch.int64"),
        ({"style": torch.ones(2, 6, 4)}, "dict"),
        (None, "NoneType"),
        (Signal(torch.ones(2, 6, 4), torch.ones(2, 4) > 0), "a Signal with one of these"),
        (Signal(torch.ones(2, 6, 4), present=torch.ones(2) > 0), "a Signal with one of these"),
    ],
)
def test_adain_takes_one_floating_map(given, got):
    with pytest.raises(ConditionError) as caught:
        build("adain", condition_dim=6)(torch.randn(2, 6, 5), given)
    assert str(caught.value) == (
        "adain at 'blocks.3' takes one floating map, without mask, presence or index; got " + got
    )


# --- adain1d ----------------------------------------------------------------------------------


def test_adain1d_is_drawn_as_one_linear():
    ours = build("adain1d")
    torch.manual_seed(0)
    theirs = nn.Linear(4, 12)
    assert torch.equal(ours.proj.weight, theirs.weight)
    assert torch.equal(ours.proj.bias, theirs.bias)
    assert not list(ours.norm.parameters())


def test_adain1d_refuses_features_of_one_position():
    with pytest.raises(ShapeError) as caught:
        build("adain1d")(torch.randn(3, 6), torch.randn(3, 4))
    assert str(caught.value) == (
        "instance norm averages over more than one element; features (3, 6) give it 1 in adain1d "
        "at 'blocks.3'"
    )


# --- a row for each class ---------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_class_norms_start_with_gains_from_zero_to_one_and_no_shift(name):
    gamma, beta = build(f"{name}(classes=500)", features=40).table.chunk(2, -1)
    assert gamma.min() >= 0
    assert gamma.max() < 1
    assert abs(gamma.mean() - 0.5) < 0.01
    assert abs(gamma.std() - 1 / math.sqrt(12)) < 0.01
    assert not beta.any()


@pytest.mark.parametrize("name", CLASSES)
def test_class_norms_may_start_at_one_for_every_class(name):
    gamma, beta = build(f"{name}(classes=3, init='identity')").table.chunk(2, -1)
    assert torch.equal(gamma, torch.ones(3, 6))
    assert not beta.any()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_each_sample_gets_the_row_of_its_class(name, dtype):
    norm = build(f"{name}(classes=3)")
    scale, shift = norm.generate(torch.tensor([2, 0], dtype=dtype))
    assert torch.equal(torch.cat([scale, shift], -1), norm.table[[2, 0]])


def test_a_class_may_be_given_for_each_position():
    norm = build("conditional_instance_norm(classes=3)")
    x, ids = torch.randn(2, 6, 5, 4), torch.randint(3, (2, 5, 4))
    gamma, beta = norm.table[ids].movedim(-1, 1).chunk(2, 1)
    torch.testing.assert_close(norm(x, ids), gamma * F.instance_norm(x) + beta)


def test_two_styles_mix_by_their_rows():
    norm = build("conditional_instance_norm(classes=3)")
    x = torch.randn(2, 6, 5)
    one, other = (norm.generate(torch.full((2,), k)) for k in (0, 2))
    mixed = ScaleShift(*(torch.lerp(a, b, 0.3) for a, b in zip(one, other, strict=True)))
    want = torch.lerp(norm.modulate(x, one), norm.modulate(x, other), 0.3)
    torch.testing.assert_close(norm.modulate(x, mixed), want)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (torch.tensor([0, 3]), ConditionError, "has the classes 0 to 2; got 0 to 3"),
        (torch.tensor([-1, 2]), ConditionError, "has the classes 0 to 2; got -1 to 2"),
        (
            torch.tensor([0.0, 1.0]),
            ConditionError,
            "has one row per class: an id is an integer; got torch.float32",
        ),
        (
            torch.tensor([True, False]),
            ConditionError,
            "has one row per class: an id is an integer; got torch.bool",
        ),
        (
            torch.tensor(1),
            ShapeError,
            "takes one class id per sample, (B,), or per position, (B, *positions); got ()",
        ),
        (
            Signal(torch.tensor([0, 1]), present=torch.tensor([True, False])),
            ConditionError,
            "takes one tensor of class ids, without mask, presence or index; got a Signal with one "
            "of these",
        ),
        (
            [0, 1],
            ConditionError,
            "takes one tensor of class ids, without mask, presence or index; got list",
        ),
    ],
)
def test_ids_that_are_no_classes_are_refused(name, ids, error, words):
    with pytest.raises(error) as caught:
        build(f"{name}(classes=3)")(torch.randn(2, 6, 5), ids)
    assert str(caught.value) == f"{name} at 'blocks.3' {words}"


@pytest.mark.parametrize("name", CLASSES)
def test_one_class_for_a_larger_batch_is_refused(name):
    with pytest.raises(ShapeError, match=r"\(1, 6\) does not fit features \(2, 6, 5\).*blocks.3"):
        build(f"{name}(classes=3)")(torch.randn(2, 6, 5), torch.tensor([1]))


@pytest.mark.parametrize("name", CLASSES)
def test_the_number_of_classes_has_no_default(name):
    with pytest.raises(SpecError, match="classes"):
        configure(name)


# --- batch norms ------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", BATCH_NORMS)
def test_running_statistics_serve_in_evaluation(spec):
    ours, plain = build(spec), nn.BatchNorm1d(6, affine=False)
    for shift in range(3):
        x = torch.randn(4, 6, 5) * 2 + shift
        ours(x, condition(spec, 4))
        plain(x)
    assert torch.equal(ours.norm.running_mean, plain.running_mean)
    assert torch.equal(ours.norm.running_var, plain.running_var)
    x, c = torch.randn(1, 6), condition(spec, 1)
    scale, shift = ours.generate(c)
    factor = scale if spec.startswith("conditional") else 1 + scale
    torch.testing.assert_close(ours.eval()(x, c), factor * plain.eval()(x) + shift)


@pytest.mark.parametrize("spec", BATCH_NORMS)
def test_momentum_is_the_share_of_a_new_batch(spec):
    x = torch.randn(4, 6, 5)
    options = "classes=3, momentum=0.25" if "classes" in spec else "momentum=0.25"
    norm = build(f"{spec.partition('(')[0]}({options})")
    norm(x, condition(spec, 4))
    torch.testing.assert_close(norm.norm.running_mean, 0.25 * x.mean((0, 2)))


@pytest.mark.parametrize("spec", BATCH_NORMS)
def test_reset_parameters_forgets_the_running_statistics(spec):
    norm = build(spec)
    norm(torch.randn(4, 6, 5) + 3, condition(spec, 4))
    norm.reset_parameters()
    assert torch.equal(norm.norm.running_mean, torch.zeros(6))
    assert torch.equal(norm.norm.running_var, torch.ones(6))


@pytest.mark.parametrize("spec", BATCH_NORMS)
def test_a_batch_of_one_element_cannot_be_trained_on(spec):
    norm = build(spec)
    with pytest.raises(ShapeError) as caught:
        norm(torch.randn(1, 6), condition(spec, 1))
    assert str(caught.value) == (
        "batch norm averages over more than one element; features (1, 6) give it 1 in "
        f"{spec.partition('(')[0]} at 'blocks.3'"
    )
    norm.eval()(torch.randn(1, 6), condition(spec, 1))


@pytest.mark.parametrize(("features", "condition_dim"), [(6, 4), (4, 6)])
def test_biggan_starts_with_two_orthogonal_maps(features, condition_dim):
    norm = build("biggan_batch_norm", features, condition_dim)
    gain, bias = norm.proj.weight.chunk(2)
    assert norm.proj.bias is None
    for one in (gain, bias):
        inner = one.T @ one if features > condition_dim else one @ one.T
        torch.testing.assert_close(inner, torch.eye(4), atol=1e-6, rtol=0)
    assert not torch.equal(gain, bias)


def test_biggan_takes_spectral_norm_on_its_projection():
    norm = build("biggan_batch_norm")
    spectral_norm(norm.proj, n_power_iterations=20)
    with torch.no_grad():
        norm.proj.parametrizations.weight.original.mul_(5)
    x, c = torch.randn(4, 6, 5), torch.randn(4, 4)
    norm(x, c).square().sum().backward()
    assert norm.proj.parametrizations.weight.original.grad.any()
    norm.eval()
    spread = torch.linalg.matrix_norm(norm.proj.weight, 2)
    torch.testing.assert_close(spread, torch.tensor(1.0), atol=1e-4, rtol=0)
    gain, bias = (c @ norm.proj.weight.T).chunk(2, -1)
    want = (1 + gain[..., None]) * norm.norm(x) + bias[..., None]
    torch.testing.assert_close(norm(x, c), want)


# --- modern_batch_norm ------------------------------------------------------------------------


def pretrained(**options):
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(6, **options)
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 2)
    return norm


def test_modern_at_the_identity_is_the_pretrained_norm():
    bn, ours = pretrained().eval(), build("modern_batch_norm(init='identity')")
    ours.load_batch_norm(bn)
    for x in (torch.randn(5, 6), torch.randn(5, 6, 4)):
        torch.testing.assert_close(ours(x, torch.randn(5, 4)), bn(x))


def test_modern_adds_changes_to_the_pretrained_affine():
    bn, ours = pretrained().eval(), build("modern_batch_norm(hidden=3)")
    ours.load_batch_norm(bn)
    x, c = torch.randn(5, 6), torch.randn(5, 4)
    delta_weight, delta_bias = ours.generate(c)
    torch.testing.assert_close(
        ours(x, c), bn(x) + delta_weight * (bn(x) - bn.bias) / bn.weight + delta_bias
    )


def test_modern_stays_as_pretrained_in_training():
    ours = build("modern_batch_norm")
    ours.load_batch_norm(pretrained())
    before = {name: value.clone() for name, value in ours.named_buffers()}
    assert {*before} == {"weight", "bias", "running_mean", "running_var"}
    x, c = torch.randn(5, 6, 4) + 3, torch.randn(5, 4)
    assert torch.equal(ours.train()(x, c), ours.eval()(x, c))
    assert all(torch.equal(value, before[name]) for name, value in ours.named_buffers())
    assert all(name.startswith(("hidden.", "delta_")) for name, _ in ours.named_parameters())


def test_modern_takes_over_a_norm_without_affine_as_one_and_zero():
    ours, bn = build("modern_batch_norm(init='identity')"), pretrained(affine=False).eval()
    ours.load_batch_norm(pretrained())
    ours.load_batch_norm(bn)
    x = torch.randn(5, 6)
    torch.testing.assert_close(ours(x, torch.randn(5, 4)), bn(x))


def test_modern_reads_the_keys_of_a_pretrained_network_in_place_of_its_norm():
    network = nn.Sequential(nn.Linear(6, 6), pretrained())
    ours = nn.Sequential(nn.Linear(6, 6), build("modern_batch_norm(init='identity')"))
    missing, surplus = ours.load_state_dict(network.state_dict(), strict=False)
    assert surplus == ["1.num_batches_tracked"]
    assert all(key.startswith(("1.hidden", "1.delta")) for key in missing)
    x = torch.randn(5, 6)
    got = ours[1](ours[0](x), torch.randn(5, 4))
    torch.testing.assert_close(got, network.eval()(x))


@pytest.mark.parametrize(
    ("bn", "words"),
    [
        (nn.BatchNorm2d(8), "it has 8 features, this site 6"),
        (
            nn.BatchNorm2d(6, eps=1e-3),
            "it has eps=0.001; build modern_batch_norm(eps=0.001)",
        ),
        (
            nn.BatchNorm2d(6, track_running_stats=False),
            "it has no running statistics (track_running_stats=False)",
        ),
    ],
)
def test_modern_refuses_a_norm_that_it_cannot_stand_for(bn, words):
    with pytest.raises(CheckpointError) as caught:
        build("modern_batch_norm").load_batch_norm(bn)
    assert str(caught.value) == (
        f"modern_batch_norm at 'blocks.3' cannot take over this BatchNorm: {words}"
    )


def test_modern_starts_with_changes_of_mean_zero():
    ours = build("modern_batch_norm(hidden=200)", features=100, condition_dim=50)
    for rows in ours.hidden.weight.chunk(2):
        assert 0.98 < rows.abs().max() / math.sqrt(6 / 250) <= 1
    for layer in (ours.delta_weight, ours.delta_bias):
        assert 0.98 < layer.weight.abs().max() / math.sqrt(6 / 300) <= 1
        assert layer.bias is None
    assert not ours.hidden.bias.any()
    with torch.no_grad():
        for leaf in ours.generate(torch.randn(100, 50)):
            assert abs(leaf.mean()) < 0.05


# --- edm2 -------------------------------------------------------------------------------------


def test_edm2_starts_as_its_activation_alone():
    x = torch.randn(3, 6, 5)
    assert torch.equal(build("edm2")(x, torch.randn(3, 4)), F.silu(x) / 0.596)


def test_edm2_gives_a_gradient_to_the_gain_alone_at_first():
    ours = build("edm2")
    ours(torch.randn(3, 6, 5), torch.randn(3, 4)).square().sum().backward()
    assert ours.gain.grad.any()
    assert not ours.weight.grad.any()


def test_edm2_keeps_magnitudes():
    ours = build("edm2", features=400, condition_dim=300)
    assert abs(ours.weight.std() - 1) < 0.01
    with torch.no_grad():
        ours.gain.fill_(1)
        scale = ours.generate(torch.randn(200, 300)).scale
        still = ours.modulate(torch.randn(200, 400), ours.generate(torch.zeros(200, 300)))
    assert abs(scale.square().mean() - 1) < 0.02
    assert abs(still.square().mean() - 1) < 0.02


def test_edm2_does_not_feel_the_length_of_a_row():
    ours = build("edm2(eps=0.0)").double()
    c = torch.randn(3, 4).double()
    with torch.no_grad():
        ours.gain.fill_(2)
        want = ours.generate(c).scale
        ours.weight.mul_(torch.rand(6, 1) + 0.5)
        torch.testing.assert_close(ours.generate(c).scale, want, rtol=0, atol=1e-14)
        norm = torch.linalg.vector_norm(ours.weight, dim=1, keepdim=True)
        ours.weight.mul_(2 / norm)  # the renormalisation that the docs show
        torch.testing.assert_close(ours.generate(c).scale, want, rtol=0, atol=1e-14)


def test_edm2_rows_are_shorter_than_one_by_eps():
    ours = build("edm2(eps=0.05)").double()
    with torch.no_grad():
        ours.gain.fill_(1)
        ours.weight.copy_(torch.eye(6, 4) * 2)
        got = ours.generate(torch.eye(4).double()).scale
    torch.testing.assert_close(got, torch.eye(4, 6).double() / 1.05)


def test_edm2_survives_a_row_of_zeros():
    ours = build("edm2")
    with torch.no_grad():
        ours.gain.fill_(1)
        ours.weight[0] = 0
    x = torch.randn(3, 6)
    y = ours(x, torch.randn(3, 4))
    assert torch.equal(y[:, 0], F.silu(x[:, 0]) / 0.596)
    y.sum().backward()
    assert ours.weight.grad.isfinite().all()


# --- ada_group_norm without scale -------------------------------------------------------------


def test_ada_group_norm_without_a_scale_has_a_projection_half_as_wide():
    whole, half = (
        build(f"ada_group_norm(groups=3, use_scale_shift_norm={on})") for on in (True, False)
    )
    assert (whole.proj.out_features, half.proj.out_features) == (12, 6)
    assert half.generate(torch.randn(2, 4))._fields == ("shift",)


def test_a_shift_before_the_norm_is_partly_undone_by_it():
    ours = build("ada_group_norm(groups=1, use_scale_shift_norm=False)")
    x = torch.randn(2, 6, 5)
    with torch.no_grad():
        ours.proj.weight.zero_()
        ours.proj.bias.fill_(3)  # the same shift for a whole group
        torch.testing.assert_close(ours(x, torch.randn(2, 4)), F.group_norm(x, 1))
