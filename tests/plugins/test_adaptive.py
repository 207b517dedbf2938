"""What the adaptive norms and their kin around sublayers start as, do and refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from condmod import ConditionError, ShapeError, SiteError, SpecError, configure, create


def drawn(*sizes, **options):
    """A Linear under the seed that `seeded` uses."""
    torch.manual_seed(7)
    return nn.Linear(*sizes, **options)


def seeded(spec, **site):
    torch.manual_seed(7)
    return create(spec, features=6, condition_dim=4, **site)


@pytest.mark.parametrize(
    ("spec", "rows", "bias"),
    [
        ("adaln", 12, True),
        ("adaln(order='scale', bias=False)", 6, False),
        ("hunyuan_shift", 6, True),
        ("ada_group_norm_diffusers(groups=2)", 12, True),
        ("z_image", 24, True),
    ],
)
def test_the_published_start_is_that_of_torch_s_linear(spec, rows, bias):
    ours, linear = seeded(spec).proj, drawn(4, rows, bias=bias)
    assert torch.equal(ours.weight, linear.weight)
    assert torch.equal(ours.bias, linear.bias) if bias else ours.bias is None


@pytest.mark.parametrize(
    ("spec", "norm"),
    [
        ("ada_rms_norm", lambda x: F.rms_norm(x, (6,), eps=1e-6)),
        ("ada_rms_norm(norm='layer')", lambda x: F.layer_norm(x, (6,), eps=1e-6)),
        (
            "ada_group_norm_k_diffusion(group_size=2)",
            lambda x: F.group_norm(x.mT, 3, eps=1e-5).mT,
        ),
    ],
)
def test_the_published_start_is_the_norm_alone(spec, norm):
    x = torch.randn(2, 5, 6)
    assert torch.equal(seeded(spec)(x, torch.randn(2, 4)), norm(x))


@pytest.mark.parametrize("order", ["shift_scale", "scale_shift"])
def test_the_order_of_adaln_names_its_rows(order):
    ours = seeded(f"adaln(order='{order}')")
    c = torch.randn(2, 4)
    rows = dict(zip(order.split("_"), ours.proj(F.silu(c)).chunk(2, dim=-1), strict=True))
    modulation = ours.generate(c)
    assert torch.equal(modulation.shift, rows["shift"])
    assert torch.equal(modulation.scale, rows["scale"])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("", []),
        ("affine=True", ["norm.bias", "norm.weight"]),
        ("affine=True, bias=False", ["norm.weight"]),
        ("affine=True, norm='rms'", ["norm.weight"]),
    ],
)
def test_the_norm_of_adaln_has_the_parameters_that_diffusers_gives_it(options, names):
    ours = seeded(f"adaln({options})")
    assert sorted(k for k, _ in ours.named_parameters() if k.startswith("norm")) == names
    assert ours.site_params == bool(names)


def test_hunyuan_shift_moves_every_position_alike_and_scales_none():
    ours = seeded("hunyuan_shift")
    x, c = torch.randn(2, 5, 6), torch.randn(2, 4)
    moved = ours(x, c) - F.layer_norm(x, (6,), eps=1e-6)
    torch.testing.assert_close(moved, ours.proj(F.silu(c))[:, None].expand_as(x))


def test_the_activation_of_ada_group_norm_diffusers_is_the_condition_s():
    plain = seeded("ada_group_norm_diffusers(groups=2)")
    active = seeded("ada_group_norm_diffusers(groups=2, activation='mish')")
    x, c = torch.randn(2, 5, 6), torch.randn(2, 4)
    assert torch.equal(active(x, c), plain(x, F.mish(c)))


def test_groups_that_do_not_divide_the_features_are_refused():
    with pytest.raises(SiteError) as caught:
        seeded("ada_group_norm_diffusers(groups=4)", name="blocks.3")
    assert str(caught.value) == (
        "ada_group_norm_diffusers at 'blocks.3': groups=4 does not divide features=6; "
        "choose groups from [1, 2, 3, 6]"
    )


def test_a_group_size_that_leaves_a_rest_is_refused():
    with pytest.raises(SiteError) as caught:
        create("ada_group_norm_k_diffusion(group_size=3)", features=7, condition_dim=4, name="a")
    assert str(caught.value) == (
        "ada_group_norm_k_diffusion at 'a': group_size=3 makes 2 groups, which do not divide "
        "features=7; choose group_size from [1, 7]"
    )


@pytest.mark.parametrize(("features", "groups"), [(8, 1), (32, 1), (48, 1), (64, 2), (96, 3)])
def test_groups_are_counted_by_their_size_as_k_diffusion_does(features, groups):
    ours = create("ada_group_norm_k_diffusion", features=features, condition_dim=4)
    assert ours.norm.groups == groups


def test_ace_layer_norm_starts_as_the_norm_with_a_bias_of_one_for_the_scalar_alone():
    ours = create("ace_layer_norm(scalar=4, label=3, noise=2)", features=6)
    scale, shift = ours.proj["scalar"].bias.chunk(2)
    assert torch.equal(scale, torch.ones(6))
    assert not shift.any()
    assert not ours.proj["label"].bias.any()
    assert ours.proj["noise"].bias is None
    x = torch.randn(2, 5, 6)
    given = {"scalar": torch.randn(2, 4), "label": torch.rand(2, 3), "noise": torch.randn(2, 5, 2)}
    want = F.layer_norm(x, (6,), eps=1e-5)
    assert torch.equal(ours(x, given), want)
    without = create("ace_layer_norm(noise=2)", features=6)
    assert torch.equal(without(x, {"noise": given["noise"]}), want)


def test_ace_layer_norm_takes_its_maps_with_their_width_where_the_features_have_theirs():
    last = create("ace_layer_norm(scalar=4, noise=2)", features=6)
    nn.init.normal_(last.proj["noise"].weight)
    first = create("ace_layer_norm(scalar=4, noise=2)", features=6, channel_dim=1)
    first.load_state_dict(last.state_dict())
    x, scalar, noise = torch.randn(2, 5, 3, 6), torch.randn(2, 4), torch.randn(2, 5, 3, 2)
    want = last(x, {"scalar": scalar, "noise": noise}).movedim(-1, 1)
    got = first(x.movedim(-1, 1), {"scalar": scalar, "noise": noise.movedim(-1, 1)})
    torch.testing.assert_close(got, want)


def test_ace_layer_norm_keeps_a_small_scale_beside_the_one_in_bfloat16():
    ours = create("ace_layer_norm(scalar=4, noise=1)", features=6)
    nn.init.constant_(ours.proj["noise"].weight, 2**-10)
    ours.bfloat16()
    given = {"scalar": torch.randn(2, 4).bfloat16(), "noise": torch.ones(2, 1).bfloat16()}
    scale = ours.generate(given).scale.double()
    assert torch.equal(scale, torch.full((2, 6), 1 + 2**-10).double())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            "",
            "it takes none of scalar, label, noise and position; give the width of at least one, "
            "as in scalar=128",
        ),
        (
            "noise=2, affine=True, global_norm=True",
            "affine=True with global_norm=True would be a weight per position, for maps of one "
            "size; leave one of them out",
        ),
    ],
)
def test_ace_layer_norm_refuses_options_that_mean_nothing(options, text):
    with pytest.raises(SpecError) as caught:
        configure(f"ace_layer_norm({options})")
    assert str(caught.value).partition("\n")[0] == f"ace_layer_norm: {text}"


SCALAR, NOISE = torch.randn(2, 4), torch.randn(2, 5, 3)
KEYS = "takes a mapping with the keys ['noise', 'scalar']"
IDS = "ids go through torch.nn.functional.one_hot or an encoder such as label"
SIZES = "conditions have one batch, and maps have equal positions"


@pytest.mark.parametrize(
    ("error", "given", "text"),
    [
        (ConditionError, SCALAR, f" {KEYS}; got Tensor"),
        (ConditionError, {"scalar": SCALAR}, f" {KEYS}; missing ['noise'], surplus []"),
        (
            ConditionError,
            {"scalar": SCALAR, "noise": NOISE, "label": SCALAR},
            f" {KEYS}; missing [], surplus ['label']",
        ),
        (
            ConditionError,
            {"scalar": SCALAR.long(), "noise": NOISE},
            f": 'scalar' is a plain floating tensor; got torch.int64; {IDS}",
        ),
        (
            ConditionError,
            {"scalar": SCALAR, "noise": 3.0},
            f": 'noise' is a plain floating tensor; got float; {IDS}",
        ),
        (
            ShapeError,
            {"scalar": SCALAR[0], "noise": NOISE},
            ": 'scalar' is (B, scalar=4), or a map (B, *positions, 4); got (4,)",
        ),
        (
            ShapeError,
            {"scalar": SCALAR, "noise": NOISE.mT},
            ": 'noise' is (B, noise=3), or a map (B, *positions, 3); got (2, 3, 5)",
        ),
        (
            ShapeError,
            {"scalar": SCALAR[:1], "noise": NOISE},
            f": {SIZES}; got scalar (1, 4), noise (2, 5, 3)",
        ),
        (
            ShapeError,
            {"scalar": SCALAR[:, None], "noise": NOISE},
            f": {SIZES}; got scalar (2, 1, 4), noise (2, 5, 3)",
        ),
    ],
)
def test_ace_layer_norm_says_what_is_wrong_with_its_conditions(error, given, text):
    ours = create("ace_layer_norm(scalar=4, noise=3)", features=6, name="blocks.3")
    with pytest.raises(error) as caught:
        ours(torch.randn(2, 5, 6), given)
    assert str(caught.value) == f"ace_layer_norm at 'blocks.3'{text}"


def test_a_channels_first_map_is_asked_for_where_the_features_are():
    ours = create("ace_layer_norm(noise=3)", features=6, channel_dim=1)
    with pytest.raises(ShapeError) as caught:
        ours(torch.randn(2, 6, 5), {"noise": NOISE})
    assert str(caught.value) == (
        "ace_layer_norm: 'noise' is (B, noise=3), or a map (B, 3, *positions); got (2, 5, 3)"
    )


@pytest.mark.parametrize(
    ("spec", "gate"),
    [("af3_adaln", "gate"), ("adaptive_layer_scale", "proj")],
)
def test_an_output_gate_starts_at_the_sigmoid_of_its_bias(spec, gate):
    for options, bias in (("", -2.0), ("(gate_bias=0.5)", 0.5)):
        layer = getattr(seeded(f"{spec}{options}"), gate)
        assert not layer.weight.any()
        assert torch.equal(layer.bias, torch.full((6,), bias))
    x, y = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    want = x + torch.sigmoid(torch.tensor(-2.0)) * y
    torch.testing.assert_close(seeded(spec)(x, torch.randn(2, 4), lambda _: y), want)


def test_af3_adaln_norms_the_condition_for_scale_and_shift_and_not_for_the_gate():
    ours = seeded("af3_adaln")
    nn.init.normal_(ours.gate.weight)
    assert (ours.condition_norm.bias, ours.shift.bias) == (None, None)
    c = torch.randn(2, 4, dtype=torch.float64)
    [one], [large] = (ours.double().generate(factor * c) for factor in (1, 100))
    torch.testing.assert_close(large.scale, one.scale, rtol=0, atol=1e-3)
    torch.testing.assert_close(large.shift, one.shift, rtol=0, atol=1e-3)
    torch.testing.assert_close(large.gate + 2, 100 * (one.gate + 2))


def test_adaptive_layer_scale_gives_the_sublayer_the_features_themselves():
    x, seen = torch.randn(2, 5, 6), []
    seeded("adaptive_layer_scale")(x, torch.randn(2, 4), lambda h: seen.append(h) or h)
    assert seen[0] is x


@pytest.mark.parametrize(("spec", "gates"), [("pi05", [2]), ("lumina", [1, 3])])
def test_a_closed_block_is_the_identity_and_moves_its_gates_first(spec, gates):
    ours = seeded(spec)
    x = torch.randn(2, 5, 6)
    y = ours(x, torch.randn(2, 4), *[torch.sin] * ours.parts)
    assert torch.equal(y, x)
    y.square().sum().backward()
    rows = ours.proj.weight.grad.chunk(3 if spec == "pi05" else 4)
    assert [number for number, row in enumerate(rows) if row.any()] == gates


def test_pi05_does_not_activate_its_condition_and_reads_scale_shift_gate():
    ours = seeded("pi05")
    with torch.no_grad():
        ours.proj.bias.copy_(torch.arange(18.0))
    [part] = ours.generate(torch.zeros(2, 4))
    assert torch.equal(torch.cat(part, -1)[0], torch.arange(18.0))
    nn.init.normal_(ours.proj.weight)
    c = torch.randn(2, 4)
    assert torch.equal(torch.cat(ours.generate(c)[0], -1), ours.proj(c))


@pytest.mark.parametrize("spec", ["lumina", "z_image"])
def test_each_sublayer_has_two_norms_of_its_own(spec):
    ours = seeded(spec)
    nn.init.normal_(ours.proj.bias)
    x, c = torch.randn(2, 5, 6), torch.randn(2, 4)
    attention, feed_forward = ours.generate(c)
    before = [
        ours.enter(x, attention, None),
        ours.exit(x, x.sin(), attention, None),
        ours.enter(x, feed_forward, None),
        ours.exit(x, x.sin(), feed_forward, None),
    ]
    names = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
    for number, name in enumerate(names):
        other = copy.deepcopy(ours)
        nn.init.constant_(getattr(other.norms, name).weight, 3.0)
        after = [
            other.enter(x, attention, None),
            other.exit(x, x.sin(), attention, None),
            other.enter(x, feed_forward, None),
            other.exit(x, x.sin(), feed_forward, None),
        ]
        pairs = zip(before, after, strict=True)
        assert [not torch.equal(*pair) for pair in pairs] == [i == number for i in range(4)]


def test_the_parts_of_a_block_stay_apart_through_pickle_and_tree_functions():
    parts = seeded("lumina").generate(torch.randn(2, 4))
    kinds = [type(part).__name__ for part in parts]
    assert kinds == ["Attention", "FeedForward"]
    for same in (
        pickle.loads(pickle.dumps(parts)),
        torch.utils._pytree.tree_map(torch.clone, parts),
    ):
        assert [type(part) for part in same] == [type(part) for part in parts]


def test_lumina_activates_the_condition_and_z_image_does_not():
    lumina, z_image = seeded("lumina"), seeded("z_image")
    lumina.load_state_dict(z_image.state_dict())
    c = torch.randn(2, 4)
    for active, plain in zip(lumina.generate(c), z_image.generate(F.silu(c)), strict=True):
        assert torch.equal(torch.cat(active, -1), torch.cat(plain, -1))


def test_a_block_of_lumina_has_at_most_two_sublayers():
    with pytest.raises(SpecError) as caught:
        configure("lumina(parts=3)")
    assert str(caught.value).partition("\n")[0] == (
        "lumina: parts should be less than or equal to 2; got 3"
    )
    assert [name for name, _ in seeded("lumina(parts=1)").norms.named_children()] == [
        "attention_norm1",
        "attention_norm2",
    ]
