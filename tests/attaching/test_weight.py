"""Modulators that read a layer's weight, change the width, or read the features alone, attached."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import condmod
from condmod import ConditionError, SiteError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        h = self.narrow(self.wide(x).relu())
        return self.head(h.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def c():
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(2))


def stir(conditioned):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in conditioned.bank.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return conditioned


PATTERNS = {"wide": "stylegan2", "narrow": "stylegan2", "head": "stylegan2"}


def test_the_placement_is_the_weight_and_the_widths_those_of_the_layer(net):
    plan = condmod.plan(net, PATTERNS, condition_dim=7, start="published")
    assert [(p.placement, p.site.features, p.site.out_features) for p in plan] == [
        ("weight", 3, 8),
        ("weight", 8, 4),
        ("weight", 4, 5),
    ]
    first = str(plan).splitlines()[1]
    assert "3 to 8" in first
    assert first.split()[2:4] == ["stylegan2", "weight"]
    assert plan.to_dict()["sites"][0]["out_features"] == 8


def test_it_starts_as_the_base_bit_for_bit_and_comes_off(net, x, c):
    want = net(x)
    conditioned = condmod.attach(net, PATTERNS, condition_dim=7)
    assert str(conditioned.plan.sites[0].config) == "stylegan2(demodulate=False, init='identity')"
    assert torch.equal(conditioned(x, condition=c), want)
    stir(conditioned)
    assert not torch.allclose(conditioned(x, condition=c), want)
    assert torch.equal(conditioned(x, condition=c, strength=0.0), want)
    assert torch.equal(conditioned.detach()(x), want)


def test_every_sample_gets_the_layer_with_its_own_weight(net, x, c):
    conditioned = stir(
        condmod.attach(net, {"wide": "stylegan2"}, condition_dim=7, start="published")
    ).double()
    got = conditioned(x.double(), condition=c.double())
    style = conditioned.bank(c.double())["wide"][0].style
    conditioned.detach()
    layer = net.wide
    for row in range(len(x)):
        weight = layer.weight * style[row][None, :, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        h = nn.functional.conv2d(x[row : row + 1].double(), weight, layer.bias, padding=1)
        want = net.head(net.narrow(h.relu()).mean((2, 3)))
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-10, atol=1e-10)


def test_it_compiles_checkpoints_and_copies_with_its_gradients(net, x, c):
    conditioned = stir(condmod.attach(net, PATTERNS, condition_dim=7, start="published"))
    want = conditioned(x, condition=c)
    want.sum().backward()
    grads = {name: p.grad.clone() for name, p in conditioned.bank.named_parameters()}
    assert all(grad.any() for grad in grads.values())

    def check(run, module):
        module.zero_grad()
        y = run()
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        y.sum().backward()
        for name, parameter in module.bank.named_parameters():
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-4)

    compiled = torch.compile(conditioned, fullgraph=True, backend="aot_eager")
    check(lambda: compiled(x, condition=c), conditioned)
    copied = copy.deepcopy(conditioned)
    check(lambda: copied(x, condition=c), copied)

    def recomputed():
        with conditioned.condition(c):
            return checkpoint(conditioned.base, x, use_reentrant=False)

    check(recomputed, conditioned)
    program = torch.export.export(conditioned, (x,), {"condition": c}, strict=False)
    torch.testing.assert_close(program.module()(x, condition=c), want, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_it_is_saved_and_loaded(net, x, c, tmp_path):
    conditioned = stir(condmod.attach(net, PATTERNS, condition_dim=7))
    want = conditioned(x, condition=c)
    conditioned.save_pretrained(tmp_path / "adapter")
    again = condmod.load_pretrained(conditioned.detach(), tmp_path / "adapter")
    assert again.plan.sites[0].site.out_features == 8
    assert torch.equal(again(x, condition=c), want)


def test_folding_is_refused(net, c):
    conditioned = condmod.attach(net, PATTERNS, condition_dim=7)
    with pytest.raises(condmod.FoldError, match="stylegan2 reads the sublayer's weight"):
        conditioned.fold(c[:1])


@pytest.mark.parametrize(
    ("make", "patterns", "text"),
    [
        (
            Net,
            {"wide": ("stylegan2", "around")},
            "stylegan2 reads a layer's weight, so its placement is 'weight'; the pattern 'wide' "
            "says 'around'",
        ),
        (
            Net,
            {"wide": ("film", "weight")},
            "film turns features into features, so its placement is 'input' or 'output'; the "
            "pattern 'wide' says 'weight'",
        ),
        (
            Net,
            {"wide": ("adaln_zero", "around")},
            "no site can stand at 'wide' (around): it turns 3 features into 8, and what acts "
            "around it keeps their number",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(make, patterns, text):
    with pytest.raises(SiteError) as error:
        condmod.plan(make(), patterns, condition_dim=7)
    assert str(error.value) == text


def test_a_shared_weight_is_refused_with_the_names(c):
    net = nn.ModuleDict({"first": nn.Linear(6, 6), "second": nn.Linear(6, 6)})
    net["second"].weight = net["first"].weight
    with pytest.raises(SiteError) as error:
        condmod.plan(net, {"first": "stylegan2"}, condition_dim=7)
    assert str(error.value) == (
        "stylegan2 cannot stand at 'first' (weight): its weight is shared (first.weight, "
        "second.weight), and only one of these would be conditioned; untie them, or place a "
        "modulator of features there"
    )


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # what makes the layer
@pytest.mark.parametrize("name", ["norm", "quantised"])
def test_a_layer_whose_weight_cannot_be_read_is_refused(name):
    quantised = torch.ao.nn.quantized.dynamic.Linear(6, 6)
    net = nn.ModuleDict({"norm": nn.LayerNorm(6), "quantised": quantised})
    given = ("stylegan2", condmod.Site(6))
    with pytest.raises(SiteError, match=f"stylegan2 cannot stand at '{name}' \\(weight\\): "):
        condmod.plan(net, {name: given}, condition_dim=7)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (
            ("stylegan2", condmod.Site(3, channel_dim=1, out_features=99)),
            "the Site of 'wide' says out_features=99, but 'wide' (Conv2d) gives 8",
        ),
        (
            ("film", condmod.Site(8, channel_dim=1, out_features=3)),
            "the Site of 'wide' says features=8 and out_features=3; at the output of 'wide' there "
            "is one width, say it as features",
        ),
    ],
)
def test_widths_by_hand_that_the_module_has_not_are_refused(net, choice, text):
    with pytest.raises(SiteError) as error:
        condmod.plan(net, {"wide": choice}, condition_dim=7)
    assert str(error.value) == text


def test_what_a_site_by_hand_leaves_unsaid_is_known_of_the_layer(net, x, c):
    for spec in ("stylegan2", "conditional_low_rank", "wavenet_gate"):
        given = (spec, condmod.Site(3, channel_dim=1))
        (planned,) = condmod.plan(net, {"wide": given}, condition_dim=7, start="published")
        assert planned.site.out_features == 8
    same = ("film", condmod.Site(8, channel_dim=1, out_features=8))
    (planned,) = condmod.plan(net, {"wide": same}, condition_dim=7)
    assert planned.site.out_features is None


def test_a_model_whose_layer_gives_another_width_is_refused(net, tmp_path):
    plan = condmod.plan(net, {"wide": "conditional_low_rank"}, condition_dim=7)
    other = Net()
    other.wide = nn.Conv2d(3, 6, 3, padding=1)
    with pytest.raises(SiteError) as error:
        condmod.attach(other, plan)
    assert str(error.value) == "the plan has 8 features that 'wide' gives, the model 6"
    condmod.attach(net, plan).save_pretrained(tmp_path / "adapter")
    with pytest.raises(condmod.CheckpointError, match="wide gives 6 features, not 8"):
        condmod.load_pretrained(other, tmp_path / "adapter")


def test_it_stands_beside_what_an_encoder_steers_and_has_none_of_its_own(net, x, c):
    encoder = "vector(features=7)"
    conditioned = condmod.attach(
        net, {"wide": "squeeze_excite", "narrow": "film"}, encoder=encoder, start="published"
    )
    assert conditioned(x, condition=c).shape == (4, 5)
    with pytest.raises(SiteError) as error:
        condmod.plan(net, {"wide": "squeeze_excite"}, encoder=encoder, start="published")
    assert str(error.value) == (
        "every modulator of the plan reads the features alone, and none takes what "
        "encoder='vector(features=7)' gives; leave it out"
    )


def test_what_reads_the_features_alone_needs_no_condition(net, x):
    want = net(x)
    conditioned = condmod.attach(net, {"wide": "squeeze_excite"}, start="published")
    assert conditioned.plan.needs_condition is False
    assert str(conditioned.plan).endswith("% of the model's)")
    assert ", no condition, " in str(conditioned.plan)
    got = conditioned(x)
    assert not torch.allclose(got, want)
    with conditioned.condition():
        assert torch.equal(net(x), got)
        assert torch.equal(conditioned(x), got)
    with conditioned.disabled():
        assert torch.equal(conditioned(x), want)
    assert torch.equal(conditioned(x, strength=0.0), want)
    conditioned.disable()
    assert torch.equal(conditioned(x), want)
    assert torch.equal(conditioned(x, strength=0.5), want)
    conditioned.enable()
    compiled = torch.compile(conditioned, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), got)
    got.sum().backward()
    assert all(p.grad is not None for p in conditioned.bank.parameters())
    with pytest.raises(ConditionError) as error:
        conditioned(x, condition=torch.ones(4, 2))
    assert str(error.value) == (
        "the attachment 'default' reads the features alone and takes no condition; call "
        "conditioned(x)"
    )
    with pytest.raises(ConditionError, match="the site 'wide' has no condition"):
        net(x)


@pytest.mark.parametrize("spec", ["squeeze_excite", "per_timestep"])
def test_a_width_that_nothing_takes_is_refused(net, spec):
    with pytest.raises(SiteError) as error:
        condmod.plan(net, {"wide": spec}, condition_dim=7, start="published")
    assert str(error.value) == (
        "no modulator of the plan takes a condition of a width: they have encoders of their own, "
        "or read the features alone; leave out condition_dim=7"
    )


def test_beside_others_it_is_given_none_of_their_condition(net, x, c):
    conditioned = condmod.attach(
        net, {"wide": "squeeze_excite", "narrow": "film"}, condition_dim=7, start="published"
    )
    assert conditioned.plan.needs_condition
    assert conditioned(x, condition=c).shape == (4, 5)
    with pytest.raises(ConditionError, match="has no condition"):
        conditioned(x)


def test_tokens_steer_a_channels_first_site_through_their_encoder(net, x):
    conditioned = condmod.attach(
        net,
        {"wide": "cross_attention(heads=2)"},
        encoder="tokens(features=6, mode='keep')",
        condition_dim=8,
    )
    tokens = torch.randn(4, 5, 6)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [2]])
    want = conditioned(x, condition=condmod.Signal(tokens, mask=mask))
    stir(conditioned)
    got = conditioned(x, condition=condmod.Signal(tokens, mask=mask))
    hidden = torch.where(mask[..., None], tokens, torch.full_like(tokens, 9.0))
    again = conditioned(x, condition=condmod.Signal(hidden, mask=mask))
    torch.testing.assert_close(got, again)
    assert not torch.allclose(got, want)


def test_a_map_steers_a_site_at_any_resolution(net, x):
    conditioned = condmod.attach(
        net, {"wide": "spade(norm='instance')"}, condition_dim=2, start="published"
    )
    for side in (3, 6, 12):
        assert conditioned(x, condition=torch.randn(4, 2, side, side)).shape == (4, 5)
