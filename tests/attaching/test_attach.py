"""What attach promises: the model as it was, steered, and given back."""

import copy
import re
import warnings
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import nn

import condmod
from condmod.errors import ConditionError, ShapeError, SiteError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.mlp(self.norm1(x))


class Net(nn.Module):
    title = "net"

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


PATTERNS = {
    "blocks.*.norm1": "film",
    "blocks.*.mlp": "adaln_zero",
    "head": ("dense_film", "input"),
}


def drawn(conditioned):
    """The same with a bank that does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in conditioned.bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return conditioned


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def c():
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(3))


def test_an_attached_model_starts_as_the_model_bit_for_bit(net, x, c):
    want = net(x)
    conditioned = condmod.attach(net, PATTERNS, condition_dim=4)
    assert torch.equal(conditioned(x, condition=c), want)


def test_what_is_attached_acts_as_the_layer_written_by_hand(net, x, c):
    conditioned = drawn(condmod.attach(net, {"blocks.0.norm1": "film"}, condition_dim=4))
    film = conditioned.bank.modulators()["blocks.0.norm1"]
    first, second = copy.deepcopy(net).blocks
    condmod_free = copy.deepcopy(conditioned).detach()
    block = condmod_free.blocks[0]
    h = x + block.mlp(film(block.norm1(x), c))
    want = condmod_free.head(condmod_free.blocks[1](h))
    assert torch.equal(conditioned(x, condition=c), want)
    assert (type(first), type(second)) == (Block, Block)


def test_placements_act_on_what_is_read_what_is_given_and_around(net, x, c):
    conditioned = drawn(condmod.attach(net, PATTERNS, condition_dim=4))
    bank = conditioned.bank.modulators()
    plain = copy.deepcopy(conditioned).detach()
    h = x
    for i, block in enumerate(plain.blocks):
        normed = bank[f"blocks.{i}.norm1"](block.norm1(h), c)
        h = h + bank[f"blocks.{i}.mlp"](normed, c, block.mlp)
    want = plain.head(bank["head"](h, c))
    torch.testing.assert_close(conditioned(x, condition=c), want, rtol=0, atol=0)


def test_the_base_keeps_its_state_dict_and_classes_pass_for_their_own(net):
    keys = list(net.state_dict())
    condmod.attach(net, PATTERNS, condition_dim=4)
    assert list(net.state_dict()) == keys
    assert isinstance(net.blocks[0].norm1, nn.LayerNorm)
    assert (
        repr(net.blocks[0].norm1)
        == "LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)"
    )


def test_only_the_bank_trains(net, x, c):
    conditioned = condmod.attach(net, PATTERNS, condition_dim=4)
    optimiser = torch.optim.SGD([p for p in conditioned.parameters() if p.requires_grad], lr=0.1)
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):
        conditioned(x, condition=c).square().sum().backward()
        optimiser.step()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is not None and p.grad.any() for p in conditioned.bank.parameters())
    assert all(p.grad is None for p in net.parameters())
    assert conditioned.trainable() == ("      trains  all\nbank     480  480\nbase       0  619")


@pytest.mark.parametrize(
    ("freeze", "trains"),
    [
        ("none", {"blocks.0.norm1.weight", "blocks.1.mlp.2.bias", "head.weight"}),
        (["blocks.**"], {"head.weight", "head.bias"}),
        (["blocks.0", "**.bias"], {"blocks.1.norm1.weight", "head.weight"}),
    ],
)
def test_freeze_says_what_of_the_base_trains(net, freeze, trains):
    condmod.attach(net, PATTERNS, condition_dim=4, freeze=freeze)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    assert all(flags[name] for name in trains)
    assert all(flags.values()) == (freeze == "none")
    if freeze == ["blocks.0", "**.bias"]:
        assert not flags["head.bias"]
        assert not flags["blocks.0.norm1.weight"]


def test_detach_gives_the_model_back(net, x, c):
    net.blocks[0].mlp[0].weight.requires_grad_(False)
    net.head.register_forward_hook(lambda module, args, output: None)
    before = copy.deepcopy(net)
    conditioned = drawn(condmod.attach(net, PATTERNS, condition_dim=4))
    conditioned(x, condition=c)
    back = conditioned.detach()
    assert back is net
    assert [type(m) for m in net.modules()] == [type(m) for m in before.modules()]
    assert [vars(m).keys() for m in net.modules()] == [vars(m).keys() for m in before.modules()]
    assert list(net.state_dict()) == list(before.state_dict())
    assert [p.requires_grad for p in net.parameters()] == [
        p.requires_grad for p in before.parameters()
    ]
    assert len(net.head._forward_hooks) == 1
    assert torch.equal(net(x), before(x))


def test_a_detached_attachment_says_so(net, x, c):
    conditioned = condmod.attach(net, PATTERNS, condition_dim=4)
    want = conditioned(x, condition=c)
    conditioned.detach()
    assert not conditioned.is_on
    text = "the attachment 'default' is detached; attach again, or call the model itself"
    for call in (lambda: conditioned(x, condition=c), lambda: conditioned.fold(c[:1])):
        with pytest.raises(ConditionError, match=f"^{text}$"):
            call()
    assert torch.equal(conditioned(x), want)


def test_a_condition_may_be_set_around_someone_elses_loop(net, x, c):
    conditioned = drawn(condmod.attach(net, PATTERNS, condition_dim=4))
    want = conditioned(x, condition=c)
    with conditioned.condition(c):
        assert torch.equal(net(x), want)
        assert torch.equal(net(x), want)


def test_strength_is_the_base_at_0_and_the_whole_at_1(net, x, c):
    want = net(x)
    conditioned = drawn(condmod.attach(net, PATTERNS, condition_dim=4))
    whole = conditioned(x, condition=c)
    assert torch.equal(conditioned(x, condition=c, strength=0), want)
    assert torch.equal(conditioned(x, condition=c, strength=torch.tensor(1.0)), whole)
    half = conditioned(x, condition=c, strength=0.5)
    assert not torch.equal(half, whole)
    assert not torch.equal(half, want)


def test_an_attachment_can_be_switched_off_and_on(net, x, c):
    want = net(x)
    conditioned = drawn(condmod.attach(net, PATTERNS, condition_dim=4))
    with conditioned.disabled():
        assert torch.equal(conditioned(x), want)
        assert torch.equal(net(x), want)
    conditioned.disable()
    assert not conditioned.is_on
    assert torch.equal(conditioned(x), want)
    with pytest.raises(ConditionError, match=r"^the attachment 'default' is switched off; call "):
        conditioned(x, condition=c)
    conditioned.enable()
    assert conditioned.is_on
    assert not torch.equal(conditioned(x, condition=c), want)


def test_several_attachments_act_one_upon_the_other(net, x, c):
    one = drawn(condmod.attach(net, {"head": "film"}, condition_dim=4, name="one"))
    two = drawn(condmod.attach(net, {"head": "film"}, condition_dim=4, name="two"))
    plain = condmod.detach(copy.deepcopy(net))
    films = [each.bank.modulators()["head"] for each in (one, two)]
    want = films[1](films[0](plain(x), c), 2 * c)
    with one.condition(c), two.condition(2 * c):
        assert torch.equal(net(x), want)
    one.detach()
    assert torch.equal(two(x, condition=c), films[1](plain(x), c))
    assert not any(p.requires_grad for p in net.parameters())
    two.detach()
    assert type(net.head) is nn.Linear
    assert all(p.requires_grad for p in net.parameters())


def test_a_copy_of_one_of_two_attachments_asks_for_the_other(net, x, c):
    one = drawn(condmod.attach(net, {"head": "film"}, condition_dim=4, name="one"))
    two = drawn(condmod.attach(net, {"head": "film"}, condition_dim=4, name="two"))
    both = copy.deepcopy(nn.ModuleList([one, two]))
    with one.condition(c), two.condition(2 * c):
        want = net(x)
    with both[0].condition(c), both[1].condition(2 * c):
        assert torch.equal(both[0].base(x), want)
    alone = copy.deepcopy(one)
    with pytest.raises(ConditionError, match="the attachment 'two' is on"):
        alone(x, condition=c)
    condmod.detach(alone.base, "two")
    with two.disabled():
        assert torch.equal(alone(x, condition=c), one(x, condition=c))


def test_what_the_model_has_is_read_through(net):
    conditioned = condmod.attach(net, PATTERNS, condition_dim=4)
    assert conditioned.title == "net"
    assert conditioned.blocks is net.blocks
    with pytest.raises(AttributeError, match="'Net' object has no attribute 'nothing'"):
        _ = conditioned.nothing


def test_an_encoder_belongs_to_the_attachment(net, x):
    conditioned = condmod.attach(
        net, PATTERNS, encoder="fuse(inputs={'time': timestep, 'label': label(classes=3)})"
    )
    signals = {"time": torch.tensor([1.0, 500.0]), "label": torch.tensor([0, 2])}
    assert conditioned(x, condition=signals).shape == (2, 5, 3)
    drawn(conditioned)
    other = {**signals, "label": torch.tensor([1, 1])}
    assert not torch.equal(conditioned(x, condition=signals), conditioned(x, condition=other))
    assert any(name.startswith("encoder.") for name in conditioned.bank.state_dict())


def test_an_encoders_frames_reach_sites_with_channels_first():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 6, 1))
    conditioned = drawn(condmod.attach(net, {"0": "film"}, encoder="vector(features=5)"))
    frames = torch.randn(2, 7, 5)
    got = conditioned(torch.zeros(2, 3, 7), condition=frames)
    one = conditioned(torch.zeros(2, 3, 1), condition=frames[:, 4:5])
    torch.testing.assert_close(got[:, :, 4:5], one)


def test_a_modulator_with_an_encoder_of_its_own_takes_the_raw_signal(net, x):
    conditioned = condmod.attach(net, {"head": ("per_timestep", "input")})
    assert torch.equal(conditioned(x, condition=torch.tensor([3.0, 4.0])), conditioned.detach()(x))


def test_a_trunk_is_shared_by_the_sites_of_a_pattern(net, x, c):
    conditioned = condmod.attach(net, {"blocks.*.norm1": "cnaps"}, condition_dim=4)
    assert conditioned(x, condition=c).shape == (2, 5, 3)
    shared = [name for name in conditioned.bank.state_dict() if ".shared." in name]
    assert shared
    assert all(name.startswith("groups.0.shared.") for name in shared)


def test_frozen_batch_norms_keep_their_statistics(c):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False))
    conditioned = condmod.attach(net, {"0": "film"}, condition_dim=4).train()
    before = copy.deepcopy(net.state_dict())
    conditioned(torch.randn(2, 3, 5), condition=c)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert conditioned.training
    free = condmod.attach(conditioned.detach(), {"0": "film"}, condition_dim=4, freeze="none")
    free.train()(torch.randn(2, 3, 5), condition=c)
    assert net[1].num_batches_tracked == 1


def test_a_batch_norm_of_a_detached_model_trains_as_the_model_does():
    net = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6)).train()
    condmod.attach(net, {"0": "film"}, condition_dim=4).detach()
    assert net[1].training


def test_a_site_that_a_pass_does_not_reach_is_told_of_once(net, x, c):
    conditioned = condmod.attach(net, PATTERNS, condition_dim=4)
    conditioned(x, condition=c)
    net.head = nn.Linear(8, 3)
    text = (
        "the condition did not reach head: the model did not call that module, reads its weight "
        "alone, or has another in its place"
    )
    with pytest.warns(UserWarning, match=f"^{text}$"):
        conditioned(x, condition=c)
    conditioned(x, condition=c)  # a warning would be an error here


def test_what_is_placed_in_torchs_encoder_layer_acts_in_its_fast_path_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 2).eval()
    x, c = torch.randn(2, 5, 8), torch.randn(2, 4)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    conditioned = drawn(
        condmod.attach(net, {"layers.*.linear1": ("film", "input")}, condition_dim=4)
    )
    with torch.no_grad():
        fast = conditioned(x, src_key_padding_mask=mask, condition=c)
    slow = conditioned(x, src_key_padding_mask=mask, condition=c)
    torch.testing.assert_close(fast[~mask], slow[~mask])
    bare = condmod.attach(
        copy.deepcopy(conditioned).detach(), {"layers.0": "film"}, condition_dim=4
    )
    with torch.no_grad(), bare.disabled():
        assert not torch.allclose(fast[0], bare(x)[0], atol=1e-3)
    assert net.use_nested_tensor is False
    conditioned.detach()
    assert net.use_nested_tensor is True
    assert not net.layers[0].norm1._forward_pre_hooks


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, "state"),
        lambda y: [y, None],
        lambda y: Pair(y, y),
        lambda y: OrderedDict(sample=y, other=1),
    ],
    ids=["tuple", "list", "namedtuple", "mapping"],
)
def test_the_first_of_several_outputs_is_conditioned(wrap, c):
    class Several(nn.Linear):
        def forward(self, x):
            return wrap(super().forward(x))

    torch.manual_seed(0)
    net = nn.ModuleDict({"it": Several(8, 8)})
    x = torch.randn(2, 5, 8)
    want = net["it"](x)
    conditioned = drawn(condmod.attach(net, {"it": ("film", condmod.Site(8))}, condition_dim=4))
    film = conditioned.bank.modulators()["it"]
    with conditioned.condition(c):
        got = net["it"](x)
    assert type(got) is type(want)
    first, *rest = got.values() if isinstance(got, dict) else got
    original, *others = want.values() if isinstance(want, dict) else want
    assert torch.equal(first, film(original, c))
    assert len(rest) == len(others)


def test_features_may_come_as_a_keyword_and_several_times(c):
    class Attend(nn.Module):
        def forward(self, mask, query, key=None):
            return query - key

    net = nn.ModuleDict({"it": Attend()})
    conditioned = drawn(
        condmod.attach(net, {"it": ("film", "input", condmod.Site(8))}, condition_dim=4)
    )
    site = conditioned._standing.sites["it"]
    assert (site.reads, site.place) == ("mask", 0)
    site.reads, site.place = "query", 1  # as with a plugin's Layer(argument="query")
    x = torch.randn(2, 5, 8)
    with conditioned.condition(c):
        assert not net["it"](None, query=x, key=x).any()  # the same tensor is the same afterwards
        assert not net["it"](None, x, x).any()
        assert net["it"](None, x, x.clone()).any()


def test_an_attached_float64_or_bf16_base_keeps_its_dtype(net, x, c):
    for dtype in (torch.float64, torch.bfloat16):
        base = copy.deepcopy(net).to(dtype)
        want = base(x.to(dtype))
        conditioned = condmod.attach(base, PATTERNS, condition_dim=4)
        assert torch.equal(conditioned(x.to(dtype), condition=c), want)
        assert {p.dtype for p in conditioned.bank.parameters()} == {torch.float32}


def test_a_base_on_the_meta_device_can_be_attached_to():
    with torch.device("meta"):
        net = Net()
    conditioned = condmod.attach(net, PATTERNS, condition_dim=4)
    assert all(p.is_meta for p in conditioned.parameters())


def test_the_published_start_is_had_by_asking(net, x, c):
    want = net(x)
    conditioned = condmod.attach(net, {"head": "film"}, condition_dim=4, start="published")
    assert not torch.equal(conditioned(x, condition=c), want)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (
            lambda m, x, c: m(x),
            "the site 'blocks.0.norm1' has no condition: the attachment 'default' is on, so call "
            "conditioned(x, condition=...), run the model inside `with conditioned.condition(...)`"
            ", or switch it off with conditioned.disabled(); a copy of the bare model cannot be "
            "conditioned: copy what attach returned, or condmod.detach(model)",
        ),
        (
            lambda m, x, c: copy.deepcopy(m.base)(x),
            "the site 'blocks.0.norm1' has no condition: the attachment 'default' is on, so call",
        ),
        (
            lambda m, x, c: m(x, condition=c.double()),
            "the condition is torch.float64, the attached modulators are torch.float32; convert "
            "one of them, or use autocast",
        ),
        (
            lambda m, x, c: m(x, condition=c.to("meta")),
            "the condition is on meta, the attached modulators are on cpu; move one of them",
        ),
        (
            lambda m, x, c: m(x, condition=c, strength=torch.ones(2)),
            "strength is a number or a tensor without dims; got (2,)",
        ),
        (
            lambda m, x, c: m(x, condition=c, strength="half"),
            "strength is a number or a tensor without dims; got 'half'",
        ),
        (
            lambda m, x, c: m(x, condition=None),
            "the condition is None; give one, or run the model under conditioned.disabled()",
        ),
    ],
)
def test_a_condition_that_is_not_there_or_does_not_fit_says_so(net, x, c, call, error):
    conditioned = condmod.attach(net, PATTERNS, condition_dim=4)
    with pytest.raises(ConditionError, match=f"^{re.escape(error)}"):
        call(conditioned, x, c)
    assert conditioned(x, condition=c).shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("condition", "error"),
    [
        (
            torch.zeros(3, 4),
            "the condition has a batch of 3, the features (2, 5, 8) at 'blocks.0.norm1' one of 2; "
            "repeat the condition as the model repeats its input, for guidance or beams, and mind "
            "that some layers flatten windows or experts into the batch",
        ),
        (torch.zeros(1, 4), "the condition has a batch of 1, the features (2, 5, 8) at "),
        (
            torch.zeros(2, 6, 4),
            "modulation (2, 6, 8) does not fit features (2, 5, 8) with channels at dim -1 in film "
            "at 'blocks.0.norm1'; a global one is (B, C)",
        ),
        (
            torch.zeros(2, 5),
            "film at 'blocks.0.norm1' takes a global condition (B, condition_dim=4) or an aligned ",
        ),
    ],
)
def test_a_condition_of_another_batch_or_width_says_so(net, x, c, condition, error):
    conditioned = condmod.attach(net, PATTERNS, condition_dim=4)
    with pytest.raises(ShapeError, match=f"^{re.escape(error)}"):
        conditioned(x, condition=condition)
    assert conditioned(x, condition=c).shape == (2, 5, 3)


def test_a_condition_cannot_be_set_twice(net, x, c):
    conditioned = condmod.attach(net, PATTERNS, condition_dim=4)
    text = (
        "the attachment 'default' already has a condition, or is switched off, in this thread "
        "(site 'blocks.0.norm1'); leave that context first"
    )
    with conditioned.condition(c):
        for second in (lambda: conditioned(x, condition=c), conditioned.detach):
            with pytest.raises(ConditionError, match=f"^{re.escape(text)}$"):
                second()
    with conditioned.disabled(), pytest.raises(ConditionError, match=re.escape(text)):
        conditioned(x, condition=c)


@pytest.mark.parametrize(
    ("patterns", "options", "error"),
    [
        (
            {"head": "adaln"},
            {"condition_dim": 4},
            "adaln(init='identity') at 'head' cannot start as the base: it changes features from "
            "the start (a norm, a second residual, or a start that is not the identity); choose "
            "one that leaves them, such as film or dense_film, or ask for start='published'",
        ),
        (
            {"blocks.*.mlp": "adaptive_layer_scale"},
            {"condition_dim": 4},
            "adaptive_layer_scale at 'blocks.0.mlp' cannot start as the base: it changes features",
        ),
        (
            {"head": "film"},
            {"condition_dim": 4, "freeze": "heads"},
            "freeze is 'base', 'none' or a list of patterns; got 'heads'",
        ),
        (
            {"head": "film"},
            {"condition_dim": 4, "freeze": True},
            "freeze is 'base', 'none' or a list of patterns; got True",
        ),
        (
            {"head": "film"},
            {"condition_dim": 4, "name": ""},
            "the name of an attachment is text; got ''",
        ),
        (
            {"head": "film"},
            {"condition_dim": 4, "freeze": ["heads"]},
            "the pattern 'heads' of freeze matches no module or parameter",
        ),
    ],
)
def test_what_cannot_be_attached_leaves_the_model_untouched(net, x, patterns, options, error):
    before = copy.deepcopy(net)
    with pytest.raises(SiteError, match=f"^{re.escape(error)}"):
        condmod.attach(net, patterns, **options)
    assert [vars(m).keys() for m in net.modules()] == [vars(m).keys() for m in before.modules()]
    assert [type(m) for m in net.modules()] == [type(m) for m in before.modules()]
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(net(x), before(x))


def test_a_module_whose_forward_was_replaced_fails_half_way_and_leaves_nothing(net):
    net.head.forward = net.head.forward
    with pytest.raises(
        SiteError,
        match=re.escape(
            "the forward of 'head' is set on the module itself, as accelerate's hooks do, so that "
            "no other would be called; attach first, then wrap"
        ),
    ):
        condmod.attach(net, PATTERNS, condition_dim=4)
    assert type(net.blocks[0].norm1) is nn.LayerNorm
    assert "_condmod_before" not in vars(net)


def test_a_name_is_given_once(net):
    conditioned = condmod.attach(net, PATTERNS, condition_dim=4)
    with pytest.raises(SiteError, match=r"^the model has an attachment 'default'; detach it "):
        condmod.attach(net, {"head": "film"}, condition_dim=4)
    with pytest.raises(SiteError, match=r"^this model is attached to already; attach to its base"):
        condmod.attach(conditioned, {"head": "film"}, condition_dim=4)


def test_a_plan_is_attached_to_the_model_it_fits(net):
    made = condmod.plan(net, PATTERNS, condition_dim=4)
    assert len(condmod.attach(net, made).plan) == 5
    with pytest.raises(SiteError, match=r"^the model lacks sites of the plan: blocks\.0\.norm1, "):
        condmod.attach(nn.Linear(2, 2), made)
    with pytest.raises(
        SiteError, match=r"^a plan has its condition_dim, encoder, example and start"
    ):
        condmod.attach(Net(), made, condition_dim=4)


def test_features_that_are_no_tensor_say_so(c):
    net = nn.ModuleDict({"it": nn.Identity()})
    spec = {"it": ("film", condmod.Site(8))}
    conditioned = condmod.attach(net, spec, condition_dim=4)
    with (
        conditioned.condition(c),
        pytest.raises(ShapeError, match=r"^the site 'it' conditions what its module gives, a ten"),
    ):
        net["it"]("text")
    conditioned.detach()
    conditioned = condmod.attach(net, {"it": ("film", "input", condmod.Site(8))}, condition_dim=4)
    with (
        conditioned.condition(c),
        pytest.raises(ShapeError, match=r"^the site 'it' conditions what its module reads, the ar"),
    ):
        net["it"]("text")


def test_nothing_warns(net, x, c):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        condmod.attach(net, PATTERNS, condition_dim=4)(x, condition=c)
