"""Squeeze-and-excitation, the tanh gate and the zero convolution: starts, edges and refusals."""

import pytest
import torch
from torch import nn

import condmod
from condmod import ConditionError, ShapeError, SiteError, create
from condmod.functional import Nothing, Shift


def build(spec, features=6, condition_dim=None, channel_dim=-1):
    torch.manual_seed(0)
    return create(
        spec,
        features=features,
        condition_dim=condition_dim,
        channel_dim=channel_dim,
        name="blocks.3",
    )


# --- squeeze_excite ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "options", "hidden"),
    [
        (6, "", 8),
        (64, "", 8),
        (200, "", 16),
        (1024, "", 64),
        (64, "(divisor=1)", 4),
        (6, "(divisor=1)", 1),
        (72, "(ratio=0.25)", 16),
        (72, "(ratio=0.25, divisor=1)", 18),
        (10, "(ratio=1.0, divisor=1)", 10),
    ],
)
def test_squeeze_excite_has_as_many_hidden_channels_as_ratio_and_divisor_say(
    features, options, hidden
):
    ours = build(f"squeeze_excite{options}", features)
    assert ours.reduce.weight.shape == (hidden, features)
    assert ours.expand.weight.shape == (features, hidden)


def test_squeeze_excite_starts_as_two_linears_of_torch():
    ours = build("squeeze_excite", 64)
    torch.manual_seed(0)
    reduce, expand = nn.Linear(64, 8), nn.Linear(8, 64)
    for own, other in ((ours.reduce, reduce), (ours.expand, expand)):
        assert torch.equal(own.weight, other.weight)
        assert torch.equal(own.bias, other.bias)
    x = torch.randn(4, 10, 64)
    factor = ours(x) / x
    assert 0.3 < factor.min() < factor.max() < 0.7


def test_squeeze_excite_gives_one_factor_to_each_channel_of_a_sample():
    ours = build("squeeze_excite", channel_dim=1).double()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    factor = ours(x) / x
    torch.testing.assert_close(factor, factor[:, :, :1, :1].expand_as(x))
    assert factor.flatten(1).std(1).gt(0).all()
    moved = x.clone()
    moved[0, 0, 0, 0] += 10
    change = ours(moved)[0, 1] - ours(x)[0, 1]
    assert change.abs().gt(1e-6).all(), "a channel feels the others, at every position"


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_squeeze_excite_of_features_without_positions_keeps_their_shape(channel_dim):
    ours = build("squeeze_excite", channel_dim=channel_dim)
    for shape in ((2, 0, 6), (0, 4, 6), (0, 6)):
        x = torch.randn(shape)
        x = x.movedim(-1, 1) if channel_dim == 1 else x
        assert ours(x).shape == x.shape


def test_a_hard_sigmoid_closes_and_opens_fully():
    ours = build("squeeze_excite(gate='hard_sigmoid')")
    with torch.no_grad():
        ours.expand.weight.zero_()
        ours.expand.bias.copy_(torch.tensor([-4.0, -3.0, 0.0, 1.5, 3.0, 4.0]))
    x = torch.randn(2, 5, 6)
    assert torch.equal(ours(x), x * torch.tensor([0.0, 0.0, 0.5, 0.75, 1.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squeeze_excite_of_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    ours = build("squeeze_excite")
    x = (torch.randn(3, 400, 6) + 1).to(dtype)
    assert torch.equal(ours(x), ours(x.float()).to(dtype))


# --- tanh_gate --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "(per_channel=True)"])
def test_tanh_gate_starts_at_x_and_learns_from_the_first_step(options):
    ours = build(f"tanh_gate{options}")
    x, branch = torch.randn(2, 5, 6), nn.Linear(6, 6)
    y = ours(x, None, branch)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert ours.alpha.grad.all()
    assert not branch.weight.grad.any()
    assert ours.alpha.shape == ((6,) if options else (1,))


def test_tanh_gate_bounds_what_a_branch_adds():
    ours = build("tanh_gate")
    x = torch.randn(2, 5, 6)
    for alpha, factor in ((50.0, 1.0), (-50.0, -1.0)):
        with torch.no_grad():
            ours.alpha.fill_(alpha)
        torch.testing.assert_close(ours(x, None, torch.sin), x + factor * x.sin())


def test_tanh_gate_attached_starts_as_the_sublayer():
    config = condmod.configure("tanh_gate")
    options = config.component.as_base(config)
    ours = build({"name": "tanh_gate", **options})
    x = torch.randn(2, 5, 6)
    assert torch.equal(ours(x, None, torch.sin), x.sin())
    with torch.no_grad():
        ours.alpha.fill_(-50.0)
    assert not ours(x, None, torch.sin).any(), "it can close the sublayer"


def test_a_small_gate_beside_1_counts_in_bfloat16():
    ours = build("tanh_gate(residual=False, gate='one_plus_tanh')").bfloat16()
    with torch.no_grad():
        ours.alpha.fill_(2**-8)
    x = torch.randn(2, 50, 6).bfloat16()
    want = (x.float() * (1 + torch.tensor(2.0**-8).tanh())).bfloat16()
    assert torch.equal(ours(x, None, torch.clone), want)
    assert not torch.equal(want, x)


def test_a_sublayer_of_another_shape_is_refused():
    for spec in ("tanh_gate", "tanh_gate(residual=False)"):
        with pytest.raises(ShapeError) as caught:
            build(spec)(torch.randn(2, 5, 6), None, lambda h: h[:, :3])
        assert str(caught.value) == (
            "the sublayer turned features (2, 5, 6) into (2, 3, 6) in tanh_gate at 'blocks.3'; a "
            "residual needs equal shapes"
        )


# --- both of kind self ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squeeze_excite", "tanh_gate"])
def test_what_reads_the_features_alone_takes_no_condition(name):
    ours = build(name)
    sublayers = (torch.sin,) if name == "tanh_gate" else ()
    with pytest.raises(ConditionError) as caught:
        ours(torch.randn(2, 5, 6), torch.randn(2, 4), *sublayers)
    assert str(caught.value) == (
        f"{name} at 'blocks.3' reads the features alone and takes no condition; got Tensor; call "
        "it with the features"
    )
    generated = ours.generate(None)
    assert generated == ((Nothing(),) if name == "tanh_gate" else Nothing())
    with pytest.raises(SiteError) as caught:
        build(name, condition_dim=4)
    assert str(caught.value) == (
        f"{name} at 'blocks.3' needs no condition_dim: it takes self conditions; got "
        "condition_dim=4"
    )


def test_features_of_another_width_are_refused_in_either_phase():
    squeeze, gate = build("squeeze_excite"), build("tanh_gate(per_channel=True)")
    x = torch.randn(2, 5, 4)
    with pytest.raises(ShapeError) as caught:
        squeeze.modulate(x, Nothing())
    assert str(caught.value) == (
        "squeeze_excite at 'blocks.3' takes features with 6 channels at dim -1; got (2, 5, 4)"
    )
    with pytest.raises(ShapeError) as caught:
        gate.exit(x, x, Nothing(), None)
    assert str(caught.value) == (
        "modulation (2, 6) does not fit features (2, 5, 4) with channels at dim -1 in tanh_gate "
        "at 'blocks.3'; a global one is (B, C), an aligned one has a vector of C per position of "
        "the features, and neither broadcasts"
    )


# --- zero_conv --------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_zero_conv_starts_at_x_and_learns_from_the_first_step(channel_dim):
    ours = build("zero_conv", condition_dim=4, channel_dim=channel_dim)
    x, c = torch.randn(2, 5, 7, 6), torch.randn(2, 5, 7, 4)
    if channel_dim == 1:
        x, c = x.movedim(-1, 1), c.movedim(-1, 1)
    c.requires_grad_()
    y = ours(x, c)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert ours.proj.weight.grad.all()
    assert ours.proj.bias.grad.all()
    assert not c.grad.any()


def test_zero_conv_is_a_convolution_of_the_control_features():
    ours = build("zero_conv", condition_dim=4, channel_dim=1).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    x, c = torch.randn(2, 6, 5, 7).double(), torch.randn(2, 4, 5, 7).double()
    want = x + nn.functional.conv2d(c, ours.proj.weight[..., None, None], ours.proj.bias)
    torch.testing.assert_close(ours(x, c), want)


def test_zero_conv_takes_a_strength_as_a_multiple_of_its_modulation():
    ours = build("zero_conv", condition_dim=4)
    nn.init.normal_(ours.proj.weight)
    x, c = torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    full = ours.generate(c)
    half = ours.modulate(x, Shift(0.5 * full.shift))
    torch.testing.assert_close(half, torch.lerp(x, ours(x, c), 0.5))


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3, 3), (2, 4, 5), (1, 4, 5, 7), (2, 3, 5, 7)])
def test_zero_conv_takes_control_features_of_the_same_resolution_alone(shape):
    ours = build("zero_conv", condition_dim=4, channel_dim=1)
    with pytest.raises(ShapeError) as caught:
        ours(torch.randn(2, 6, 5, 7), torch.randn(shape))
    assert str(caught.value) == (
        "zero_conv at 'blocks.3' takes an aligned condition (B, condition_dim=4, *positions) for "
        f"features (B, features=6, ...); got features (2, 6, 5, 7) and a condition {shape}"
    )
