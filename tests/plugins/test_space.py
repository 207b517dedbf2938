"""SPADE and SpatialNorm: what they start as, what they read of a map, and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F

from condmod import ConditionError, ShapeError, Signal, SiteError, SpecError, configure, create
from condmod.testing.cases import passed_on

NORMS = ("batch", "instance", "layer", "group", "none")


def build(spec="spade", features=6, condition_dim=4, channel_dim=1):
    torch.manual_seed(0)
    return create(
        spec,
        features=features,
        condition_dim=condition_dim,
        channel_dim=channel_dim,
        name="up.0.norm",
    )


def stirred(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


# --- spade ------------------------------------------------------------------------------------


def test_spade_starts_as_the_official_networks_do():
    ours = build("spade", features=64, condition_dim=32)
    for name, (into, out) in {
        "hidden": (32, 128),
        "scale": (128, 64),
        "shift": (128, 64),
    }.items():
        layer = getattr(ours, name)
        assert layer.weight.shape == (out, into, 3, 3)
        assert not layer.bias.any()
        std = 0.02 * math.sqrt(2 / (9 * (into + out)))
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
        assert abs(layer.weight.mean().item()) < 0.02 * std


@pytest.mark.parametrize("norm", NORMS)
def test_spade_at_the_identity_is_its_norm_without_parameters(norm):
    ours = build(f"spade(norm='{norm}', groups=3, init='identity')")
    x, c = torch.randn(3, 6, 4, 5), torch.randn(3, 4, 2, 2)
    last = x.movedim(1, -1)
    want = {
        "batch": F.batch_norm(x, None, None, training=True),
        "instance": F.instance_norm(x),
        "layer": F.layer_norm(last, (6,)).movedim(-1, 1),
        "group": F.group_norm(x, 3),
        "none": x,
    }[norm]
    torch.testing.assert_close(ours(x, c), want)
    assert ours.hidden.weight.any()
    assert {name for name, _ in ours.named_parameters()} == {
        f"{layer}.{kind}" for layer in ("hidden", "scale", "shift") for kind in ("weight", "bias")
    }


def test_spade_with_batch_norm_goes_by_running_statistics_in_evaluation():
    ours = stirred(build())
    x, c = torch.randn(4, 6, 5, 5) * 3 + 2, torch.randn(4, 4, 5, 5)
    for _ in range(200):
        ours(x, c)
    torch.testing.assert_close(ours.norm.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(ours.norm.running_var, x.var((0, 2, 3)))
    ours.double().eval()
    x, c = x.double(), c.double()
    torch.testing.assert_close(ours(x[:1], c[:1]), ours(x, c)[:1])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_spade_reads_the_nearest_position_of_a_map(dims):
    ours = stirred(build(f"spade(norm='none', kernel=1, spatial_dims={dims})"))
    x = torch.zeros(1, 6, *[6] * dims)
    small = torch.randn(1, 4, *[3] * dims)
    y = ours(x, small)
    spelt = small
    for dim in range(2, 2 + dims):
        spelt = spelt.repeat_interleave(2, dim)
    torch.testing.assert_close(y, ours(x, spelt))
    first = (0, slice(None), *[0] * dims)
    beside = (0, slice(None), *[1] * dims)
    beyond = (0, slice(None), *[2] * dims)
    assert torch.equal(y[first], y[beside])
    assert not torch.allclose(y[first], y[beyond])


@pytest.mark.parametrize("norm", NORMS)
def test_spade_is_the_same_with_the_channels_at_either_end(norm):
    spec = f"spade(norm='{norm}', groups=3)"
    first, last = stirred(build(spec)).double(), build(spec, channel_dim=-1).double()
    last.load_state_dict(first.state_dict())
    x, c = torch.randn(2, 6, 4, 5).double(), torch.randn(2, 4, 3, 2).double()
    y = last(x.movedim(1, -1).contiguous(), c.movedim(1, -1).contiguous())
    torch.testing.assert_close(y.movedim(-1, 1), first(x, c))


def test_spade_keeps_the_map_as_its_modulation():
    c = torch.randn(2, 4, 3, 2)
    modulation = build().generate(c)
    assert torch.equal(modulation.map, c.movedim(1, -1))
    assert passed_on(modulation.map, c), "the laws then ask no gradient of it"
    assert not any(passed_on(leaf, c) for leaf in build("spatial_norm(groups=3)").generate(c))


def test_half_precision_features_are_normed_and_modulated_in_float32_and_rounded_once():
    ours = stirred(build("spade(norm='instance')"))
    x, c = torch.randn(2, 6, 8, 8).bfloat16(), torch.randn(2, 4, 8, 8)
    assert torch.equal(ours(x, c), ours(x.float(), c).bfloat16())


def test_spade_takes_odd_kernels_alone():
    with pytest.raises(SpecError) as caught:
        configure("spade(kernel=4)")
    assert str(caught.value) == (
        "spade: kernel=4 has no centre; choose an odd one\n  spade(kernel=4)\n  ^^^^^"
    )


def test_groups_that_do_not_divide_the_features_are_refused():
    for spec in ("spade(norm='group', groups=4)", "spatial_norm(groups=4)"):
        with pytest.raises(SiteError) as caught:
            build(spec)
        assert str(caught.value) == (
            f"{spec.partition('(')[0]} at 'up.0.norm': groups=4 does not divide features=6; "
            "choose groups from [1, 2, 3, 6]"
        )


def test_a_map_with_other_sides_than_the_option_says_is_refused():
    with pytest.raises(ShapeError) as caught:
        build()(torch.randn(2, 6, 5), torch.randn(2, 4, 3))
    assert str(caught.value) == (
        "spade at 'up.0.norm' takes a map of spatial_dims=2; got a condition (2, 4, 3), which has 1"
    )


# --- spatial_norm -----------------------------------------------------------------------------


def test_spatial_norm_starts_as_two_convolutions_of_torch_do():
    ours = build("spatial_norm(groups=3)")
    torch.manual_seed(0)
    two = [torch.nn.Conv2d(4, 6, 1) for _ in range(2)]
    assert torch.equal(ours.proj.weight, torch.cat([one.weight.flatten(1) for one in two]))
    assert torch.equal(ours.proj.bias, torch.cat([one.bias for one in two]))
    assert torch.equal(ours.norm.weight, torch.ones(6))
    assert not ours.norm.bias.any()


def test_spatial_norm_at_the_identity_is_its_group_norm():
    ours = build("spatial_norm(groups=3, init='identity')")
    x = torch.randn(2, 6, 4, 5)
    want = F.group_norm(x, 3, eps=1e-6)
    torch.testing.assert_close(ours(x, torch.randn(2, 4, 2, 2)), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_spatial_norm_takes_one_to_three_sides_and_projects_at_the_resolution_of_the_map(dims):
    ours = stirred(build("spatial_norm(groups=3)")).double()
    x, z = torch.randn(2, 6, *[6] * dims).double(), torch.randn(2, 4, *[2] * dims).double()
    scale, shift = ours.generate(z)
    assert scale.shape == shift.shape == (2, *[2] * dims, 6)
    large = z
    for dim in range(2, 2 + dims):
        large = large.repeat_interleave(3, dim)
    torch.testing.assert_close(ours(x, z), ours(x, large))


# --- bad maps ---------------------------------------------------------------------------------

RESIZES = (
    "resizes its map to the features' sides, of which both have equally many, 1 to 3 and none "
    "empty, in batches of one size; got features"
)


@pytest.mark.parametrize("name", ["spade", "spatial_norm"])
@pytest.mark.parametrize(
    ("x", "c", "error"),
    [
        (
            (2, 6, 5, 5),
            (2, 3, 5, 5),
            "takes a map (B, condition_dim=4, *sides) of one position or more; got a condition "
            "(2, 3, 5, 5)",
        ),
        (
            (2, 6, 5, 5),
            (2, 4, 5, 0),
            "takes a map (B, condition_dim=4, *sides) of one position or more; got a condition "
            "(2, 4, 5, 0)",
        ),
        (
            (2, 6, 5, 5),
            (2, 4),
            "takes a map (B, condition_dim=4, *sides) of one position or more; got a condition "
            "(2, 4)",
        ),
        (
            (2, 5, 5, 5),
            (2, 4, 5, 5),
            "takes a map (B, condition_dim=4, *sides) for features (B, features=6, ...); got "
            "features (2, 5, 5, 5) and a condition (2, 4, 5, 5)",
        ),
        (
            (3, 6, 5, 5),
            (1, 4, 5, 5),
            "takes a map (B, condition_dim=4, *sides) for features (B, features=6, ...); got "
            "features (3, 6, 5, 5) and a condition (1, 4, 5, 5)",
        ),
        (
            (2, 6, 5),
            (2, 4, 5, 5),
            f"{RESIZES} (2, 6, 5) and a map (channels last) (2, 5, 5, {{}})",
        ),
        (
            (2, 6),
            (2, 4, 5, 5),
            f"{RESIZES} (2, 6) and a map (channels last) (2, 5, 5, {{}})",
        ),
        (
            (2, 6, 5, 0),
            (2, 4, 5, 5),
            f"{RESIZES} (2, 6, 5, 0) and a map (channels last) (2, 5, 5, {{}})",
        ),
    ],
)
def test_a_map_that_does_not_fit_is_refused(name, x, c, error):
    ours = build(name if name == "spade" else "spatial_norm(groups=3)")
    with pytest.raises(ShapeError) as caught:
        ours(torch.randn(x), torch.randn(c))
    held = 4 if name == "spade" else 6  # what it keeps: the map, or a scale
    assert str(caught.value) == f"{name} at 'up.0.norm' {error.format(held)}"


def test_features_with_too_many_sides_are_refused():
    ours = build("spatial_norm(groups=3)")
    with pytest.raises(ShapeError) as caught:
        ours(torch.randn(2, 6, 2, 2, 2, 2), torch.randn(2, 4, 2, 2, 2, 2))
    assert str(caught.value) == (
        f"spatial_norm at 'up.0.norm' {RESIZES} (2, 6, 2, 2, 2, 2) and a map (channels last) "
        "(2, 2, 2, 2, 2, 6)"
    )


@pytest.mark.parametrize("name", ["spade", "spatial_norm(groups=3)"])
def test_a_map_of_class_ids_or_with_a_mask_is_refused(name):
    ours = build(name)
    x, c = torch.randn(2, 6, 5, 5), torch.randn(2, 4, 5, 5)
    for condition, got in (
        (c.long(), "torch.int64"),
        (Signal(c, present=torch.ones(2).bool()), "a Signal with one of these"),
    ):
        with pytest.raises(ConditionError) as caught:
            ours(x, condition)
        assert str(caught.value) == (
            f"{name.partition('(')[0]} at 'up.0.norm' takes one floating map, without mask, "
            f"presence or index; got {got}"
        )


@pytest.mark.parametrize("name", ["spade(norm='none')", "spatial_norm(groups=3)"])
def test_modulate_alone_refuses_features_of_another_batch_or_width(name):
    ours = build(name)
    modulation = ours.generate(torch.randn(2, 4, 5, 5))
    for shape in ((1, 6, 5, 5), (3, 6, 5, 5), (2, 5, 5, 5)):
        with pytest.raises(ShapeError, match=r"at 'up.0.norm'"):
            ours.modulate(torch.randn(shape), modulation)
