"""Every rule of lint: where it speaks, in which words, and where it is silent."""

import copy

import pytest
import torch
from torch import nn

import condmod
from condmod import Site
from condmod.errors import SiteError

ZERO = (
    "no gradient reaches adaln_zero, nor what it acts on: both are shut by zeros, and stay so; let "
    "one of them start open: a last layer that is not 0, or init='identity'"
)
UNDONE = "takes its modulation out again, where it is one per sample; modulate behind the norm"
TWICE = (
    "norms by itself, and the LayerNorm beside it norms the same features too: the mechanism means "
    "one norm; take that norm away, or a modulator without one, such as film"
)


def mlp(*, closed=False, norm=False):
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    if norm:
        layers.insert(0, nn.LayerNorm(8))
    if closed:
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
    return layers


class Block(nn.Module):
    """A block of two sublayers with one modulator around both."""

    def __init__(self, spec="adaln_zero", **options):
        super().__init__()
        self.modulator = condmod.create(spec, features=8, condition_dim=4)
        self.attention, self.feedforward = mlp(), mlp(**options)

    def forward(self, x, c):
        return self.modulator(x, c, self.attention, self.feedforward)


class Steered(nn.Sequential):
    """A Sequential that hands the condition on, as ADM's does."""

    def forward(self, x, c):
        for module in self:
            x = module(x, c) if isinstance(module, condmod.Modulator) else module(x)
        return x


def steered(*modules, first=False):
    site = Site(8, 4, 1 if first else -1)
    return Steered(*(condmod.create(m, site) if isinstance(m, str) else m for m in modules))


def attached(model, patterns, **options):
    return condmod.attach(model, patterns, condition_dim=4, **options)


def told(model, *args, **options):
    return [str(finding) for finding in condmod.lint(model, *args, **options)]


def rules(model, *args, **options):
    return [finding.rule for finding in condmod.lint(model, *args, **options)]


# double zero


def test_a_closed_gate_around_what_gives_zero_is_told():
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(closed=True), Block(closed=True)])})
    assert told(model) == [f"double-zero at blocks.* (2): {ZERO}"]


def test_what_is_told_of_a_double_zero_is_so():
    model = Block(closed=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8), torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
    rows = model.modulator.proj.weight.chunk(6)
    assert not any(part.any() for part in rows[3:])
    assert rows[2].any()
    assert not model.feedforward[2].weight.any()


@pytest.mark.parametrize(
    "model",
    [
        Block(),
        Block("mmdit", closed=True),
        Block("adaln_zero(init='identity')", closed=True),
        Block("adaln_zero(gate='one_plus')", closed=True),
    ],
    ids=["open branch", "random gate", "gate at 1", "gate of 1 + 0"],
)
def test_one_zero_is_no_double_zero(model):
    assert told(model) == []


def test_a_zero_weight_that_a_bias_opens_is_no_double_zero():
    model = Block(closed=True)
    nn.init.ones_(model.feedforward[2].bias)
    assert told(model) == []


def test_a_double_zero_at_a_site_is_told_and_the_start_as_the_base_has_none():
    model = nn.Sequential(nn.Linear(8, 8), mlp(closed=True))
    site = attached(model, {"1": "adaln_zero"}, start="published", freeze="none")
    assert told(site) == [f"double-zero at 1: {ZERO}"]
    site.detach()
    assert told(attached(model, {"1": "adaln_zero"}, freeze="none")) == []


def test_a_modulation_of_zeros_alone_is_told_where_nothing_can_open_them():
    model = nn.Sequential(nn.Linear(8, 8), mlp(closed=True))
    site = attached(model, {"1": ("film", "input")})
    assert rules(site) == ["double-zero"]
    site.detach()
    assert told(attached(model, {"1": ("film", "output")})) == []
    condmod.detach(model)
    assert told(attached(model, {"1": ("film", "input")}, freeze="none")) == []


def test_a_site_in_a_bank_that_has_the_name_of_a_module_is_around_that_module():
    model = nn.Module()
    model.blocks = nn.ModuleList([mlp(closed=True), mlp()])
    sites = {f"blocks.{i}": Site(8, 4) for i in range(2)}
    model.bank = condmod.create_bank("adaln_zero(parts=1)", sites)
    assert told(model) == [f"double-zero at blocks.0: {ZERO}"]


def test_a_trunk_that_a_bank_shares_is_looked_through():
    model = nn.Module()
    model.mlp = mlp(closed=True)
    model.bank = condmod.create_bank("adaln_single(parts=1)", {"mlp": Site(8, 4)})
    assert told(model) == []
    for parameter in model.bank.parameters():
        nn.init.zeros_(parameter)
    assert rules(model) == ["double-zero"]


def test_a_gate_that_is_a_parameter_is_one_too():
    class Gated(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.gate = condmod.create("tanh_gate", features=8)
            self.mlp = mlp(**options)

        def forward(self, x):
            return self.gate(x, None, self.mlp)

    assert rules(Gated(closed=True)) == ["double-zero"]
    assert told(Gated()) == []
    opened = Gated(closed=True)
    nn.init.ones_(opened.gate.alpha)
    assert told(opened) == []


class Guesswork(nn.Module):
    """Nothing says which of the three the modulator is around."""

    def __init__(self):
        super().__init__()
        self.modulator = condmod.create("adaln_zero", features=8, condition_dim=4)
        self.entry, self.one, self.two = mlp(closed=True), mlp(), mlp()


class Demanding(nn.Module):
    """A sublayer that takes more than features."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x, mask):
        return self.proj(x) * mask


def test_where_the_structure_does_not_tell_nothing_is_guessed():
    assert told(Guesswork()) == []
    model = nn.Module()
    model.modulator = condmod.create("adaln_zero(parts=1)", features=8, condition_dim=4)
    model.attention = Demanding()
    assert told(model) == []
    both = Block(closed=True)
    both.attention = Demanding()
    assert rules(both) == ["double-zero"]  # of the other one


def test_a_site_that_serves_several_sublayers_is_not_around_the_module_of_its_name():
    model = nn.Module()
    model.block = mlp(closed=True)
    model.bank = condmod.create_bank("adaln_zero(parts=2)", {"block": Site(8, 4)})
    assert told(model) == []


class NormedMlp(nn.Module):
    """No norm, though its name has the word in it."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), mlp(closed=True)

    def forward(self, x):
        return self.mlp(self.norm(x))


def test_a_norm_beside_a_modulator_is_none_of_its_sublayers():
    model = Block()
    model.feedforward, model.norm = NormedMlp(), nn.LayerNorm(8)
    assert told(model) == [f"double-zero at adaln_zero: {ZERO}"]


def test_what_has_been_detached_is_not_looked_at():
    model = nn.Sequential(nn.Linear(8, 8), mlp(closed=True))
    site = attached(model, {"1": "adaln_zero"}, start="published", freeze="none")
    site.detach()
    assert told(site) == []
    attached(model, {"1": "film"}, name="another")
    assert told(site) == []


def test_a_site_on_a_sequential_with_a_forward_of_its_own_says_no_order():
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    model = nn.Sequential(Residual(nn.InstanceNorm1d(8)), nn.Conv1d(8, 8, 1))
    site = condmod.Site(8, channel_dim=1)
    assert told(attached(model, {"0": ("film", "input", site)})) == []


def test_where_float64_is_the_default_all_is_told_too():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = Block(closed=True)
        assert rules(model, fresh=True) == ["double-zero"]
        assert rules(steered("film", nn.InstanceNorm1d(8), first=True)) == ["undone-by-norm"]
    finally:
        torch.set_default_dtype(before)


# a norm behind, a norm before


@pytest.mark.parametrize(
    ("spec", "norm"),
    [
        ("film", nn.InstanceNorm1d(8)),
        ("film", nn.GroupNorm(8, 8)),
        ("add", condmod.functional.normalisation("instance", 8, 1)),
        ("conditional_instance_norm(classes=3)", nn.InstanceNorm1d(8, affine=True)),
    ],
    ids=["film", "groups of one", "add", "raw"],
)
def test_a_norm_of_each_channel_behind_a_modulation_is_told(spec, norm):
    owns = "classes" in spec
    modulator = condmod.create(spec, Site(8, None if owns else 4, 1))
    name = type(modulator).name
    assert told(Steered(modulator, nn.Identity(), norm)) == [
        f"undone-by-norm at 0: the {type(norm).__name__} directly behind {name} {UNDONE}"
    ]


def test_a_modulator_with_an_encoder_of_its_own_is_tried_by_what_it_holds():
    spec = "multi_condition(encoder=fuse(inputs={'a': vector(features=5)}))"
    modulator = condmod.create(spec, Site(8, channel_dim=1))
    assert rules(Steered(modulator, nn.InstanceNorm1d(8))) == ["undone-by-norm"]
    assert told(Steered(modulator, nn.BatchNorm1d(8))) == []


def test_what_is_told_of_a_norm_behind_is_so():
    model = steered("film(scale='exp')", nn.InstanceNorm1d(8, eps=0.0), first=True)
    x = torch.randn(2, 8, 7)
    one, other = (model(x, torch.randn(2, 4)) for _ in range(2))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm([8, 6]), nn.GroupNorm(1, 8), nn.GroupNorm(4, 8), nn.BatchNorm1d(8)],
    ids=["layer", "one group", "groups of two", "batch"],
)
def test_a_norm_that_leaves_what_tells_channels_or_samples_apart_is_no_finding(norm):
    assert told(steered("film", norm, first=True)) == []


def test_what_a_norm_cannot_take_out_again_is_no_finding():
    norm = nn.InstanceNorm1d(8)
    assert told(steered("gnn_film", norm, first=True)) == []
    assert told(steered("film", nn.SiLU(), norm, first=True)) == []
    assert told(steered("none", norm, first=True)) == []


def test_a_layer_of_zeros_behind_a_modulation_is_no_norm():
    closed = nn.Linear(8, 8)
    nn.init.zeros_(closed.weight)
    assert told(steered("film", closed)) == []


def test_a_norm_behind_a_site_is_told_where_a_sequential_orders_them():
    def model():
        return nn.Sequential(
            nn.Sequential(nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1)), nn.InstanceNorm1d(8), nn.ReLU()
        )

    message = f"the InstanceNorm1d directly behind film {UNDONE}"
    assert told(attached(model(), {"0.1": "film"})) == [f"undone-by-norm at 0.1: {message}"]
    assert told(attached(model(), {"0": "film"})) == [f"undone-by-norm at 0: {message}"]
    assert told(attached(model(), {"1": ("film", "input")})) == [f"undone-by-norm at 1: {message}"]
    begins = nn.Sequential(nn.Sequential(nn.InstanceNorm1d(8), nn.ReLU()), nn.Conv1d(8, 8, 1))
    site = condmod.Site(8, channel_dim=1)
    assert told(attached(begins, {"0": ("film", "input", site)})) == [
        f"undone-by-norm at 0: {message}"
    ]
    assert told(attached(model(), {"1": "film"})) == []
    assert told(attached(model(), {"0.0": "film"})) == []


def test_an_affine_norm_before_a_modulator_that_norms_is_told():
    assert told(steered(nn.LayerNorm(8), "adaln")) == [f"normed-twice at 1: adaln {TWICE}"]


def test_a_sublayer_that_begins_with_the_norm_that_its_modulator_has_is_told():
    assert told(Block(norm=True)) == [f"normed-twice at adaln_zero: adaln_zero {TWICE}"]
    assert told(Block("adaln_zero(norm='none')", norm=True)) == []


@pytest.mark.parametrize(
    "modules",
    [
        (nn.LayerNorm(8), "film"),
        (nn.LayerNorm(8, elementwise_affine=False), "adaln"),
        (nn.LayerNorm(8), nn.GELU(), "adaln"),
        (nn.GroupNorm(2, 8), "adaln"),
    ],
    ids=["no own norm", "not affine", "not directly", "another norm"],
)
def test_a_norm_that_is_not_taken_twice_is_no_finding(modules):
    assert told(steered(*modules)) == []


def test_attaching_to_an_affine_norm_is_right_unless_the_mechanism_norms_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), mlp())
    assert told(attached(model, {"1": "film"})) == []
    condmod.detach(model)
    site = attached(model, {"1": "adaln"}, start="published")
    assert told(site) == [f"normed-twice at 1: adaln {TWICE}"]
    site.detach()
    assert told(attached(model, {"2": "adaln_zero"})) == []
    ends = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    site = attached(ends, {"0": "adaln"}, start="published")
    assert told(site) == [f"normed-twice at 0: adaln {TWICE}"]


def test_batch_norms_are_compared_as_they_train():
    twice = TWICE.replace("LayerNorm", "BatchNorm1d")
    norm = nn.BatchNorm1d(8)
    assert told(steered(norm, "audio_film", first=True)) == [
        f"normed-twice at 1: audio_film {twice}"
    ]
    assert told(steered(norm, "film", first=True)) == []
    assert told(steered(norm, "audio_film(batch_norm=False)", first=True)) == []


# a foreign start


def xavier(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def as_torch(module):
    if isinstance(module, nn.Linear):
        module.reset_parameters()


def test_a_start_that_a_blanket_init_has_wiped_is_told_and_a_reset_mends_it():
    model = Block()
    model.apply(xavier)
    assert told(model) == [
        "foreign-start at modulator.proj.weight: it has left the constant that the component "
        "starts it at, and the bias beside it is still 0 as at the start: training moves both, a "
        "blanket init does not; call reset_parameters() of the component after model.apply(init)"
    ]
    model.modulator.reset_parameters()
    assert told(model) == []


def test_a_bias_that_starts_at_1_in_part_tells_by_its_zeros():
    model = condmod.create("film(init='identity')", features=8, condition_dim=4)
    nn.init.normal_(model.proj.weight)
    assert rules(model) == ["foreign-start"]
    nn.init.normal_(model.proj.bias)
    assert told(model) == []


def test_where_nothing_is_trained_every_start_must_be_as_it_was():
    model = Block()
    assert told(model, fresh=True) == []
    model.apply(as_torch)
    assert told(model) == []  # it may have been trained
    assert told(model, fresh=True) == [
        "foreign-start at modulator.proj.weight, modulator.proj.bias: the component starts it at "
        "a constant, which it is not any more; call reset_parameters() of the component after "
        "model.apply(init)"
    ]


def test_a_random_start_drawn_in_another_way_is_no_finding():
    model = Block("mmdit")
    model.apply(xavier)
    assert told(model, fresh=True) == []


@pytest.mark.parametrize("spec", ["adaln_zero", "mmdit(init='identity')", "adaptive_layer_scale"])
def test_what_training_has_moved_is_no_foreign_start(spec):
    around = condmod.create(spec, features=8, condition_dim=4)
    optimizer = torch.optim.AdamW(around.parameters(), lr=0.1)
    for _ in range(3):
        around(torch.randn(4, 8), torch.randn(4, 4), *[torch.sin] * around.parts).sum().backward()
        optimizer.step()
        assert told(around) == []


def test_a_bias_that_is_frozen_says_nothing_about_the_weight():
    model = Block()
    model.apply(xavier)
    model.modulator.proj.bias.requires_grad_(False)
    assert told(model) == []


def test_what_sites_share_has_a_start_too():
    bank = condmod.create_bank("cosmos(rank=2)", {"a": Site(8, 8), "b": Site(8, 8)})
    assert told(bank, fresh=True) == []
    nn.init.normal_(bank.shared.norm.weight)
    nn.init.normal_(bank["b"].proj[1].weight)
    assert condmod.lint(bank, fresh=True)[0].places == (
        "shared.norm.weight",
        "modulators.b.proj.1.weight",
    )


def test_a_half_precision_start_is_no_foreign_one():
    spec = "adaptive_layer_scale(gate_bias=-2.1)"
    model = condmod.create(spec, features=8, condition_dim=4)
    assert rules(model.double(), fresh=True) == []
    assert rules(model.bfloat16().eval(), fresh=True) == []


def test_parameters_without_values_are_not_compared():
    with torch.device("meta"):
        model = Block(closed=True)
    assert told(model, fresh=True) == []


# half precision


def test_components_that_train_in_half_precision_are_told():
    mend = "of a value are lost; keep it in float32 and run the model under autocast"
    model = condmod.create("film", features=8, condition_dim=4).bfloat16()
    assert told(model) == [
        "half-precision at proj.weight, proj.bias: it trains in bfloat16, where steps below 1/256 "
        f"{mend}"
    ]
    label = condmod.create_encoder("label(classes=3, nullable=True)").half()
    assert told(label) == [
        f"half-precision at null, table: it trains in float16, where steps below 1/2048 {mend}"
    ]


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 256), (torch.float16, 2048)])
def test_the_step_that_is_lost_is_the_dtypes(dtype, step):
    one = torch.tensor(1.0, dtype=dtype)
    assert one + 0.99 / step == one
    assert one + 1.01 / step != one


def test_half_precision_that_does_not_train_and_a_base_in_it_are_no_findings():
    model = condmod.create("film", features=8, condition_dim=4).bfloat16()
    assert told(copy.deepcopy(model).eval()) == []
    assert told(model.requires_grad_(False)) == []
    base = nn.Sequential(nn.Linear(8, 8).bfloat16())
    assert told(attached(base, {"0": "film"})) == []


# drops


def fuse(one, other, **options):
    inputs = {
        "label": condmod.parse(f"label(classes=3{one})"),
        "text": condmod.parse(f"vector(features=5{other})"),
    }
    return condmod.create_encoder({"name": "fuse", "inputs": inputs, **options}, out_dim=8)


NULL, DROP, MUCH = ", nullable=True", ", nullable=True, drop=0.1", ", nullable=True, drop=0.3"


@pytest.mark.parametrize(
    ("one", "other", "rates"),
    [(DROP, DROP, "0.1, so that 1%"), (DROP, NULL, "0 and 0.1, so that 0%")],
    ids=["each by itself", "one alone"],
)
def test_signals_that_are_hardly_ever_dropped_together_are_told(one, other, rates):
    assert told(fuse(one, other)) == [
        "leaking-drop at inputs.label, inputs.text: they are dropped by several draws, at "
        f"{rates} of the samples lose all of them: guidance against no condition still sees the "
        "others; drop them by one draw: one encoder fuse(inputs={...}, drop=0.1) for the whole "
        "model"
    ]


@pytest.mark.parametrize(
    "encoder",
    [
        fuse(DROP, DROP, drop=0.1),
        fuse(NULL, NULL, drop=0.02),
        fuse(NULL, NULL),
        fuse(", nullable=True, drop=0.02", ""),
        nn.ModuleList([fuse(NULL, NULL, drop=0.02), fuse("", "")]),
        nn.ModuleList([fuse(MUCH, MUCH), fuse("", "")]),
        fuse(MUCH, MUCH),
    ],
    ids=["joint too", "joint", "no drop", "one null", "beside", "and often", "often"],
)
def test_drops_that_leave_no_signal_behind_are_no_finding(encoder):
    assert told(encoder) == []


def test_the_share_without_any_signal_is_what_training_gives():
    from condmod.care.dropping import dropping

    encoder = fuse(", nullable=True, drop=0.3", ", nullable=True, drop=0.5", drop=0.2)
    assert dropping(encoder).together == pytest.approx(0.2 + 0.8 * 0.15)
    assert dropping(encoder).rates["inputs.text"] == pytest.approx(0.2 + 0.8 * 0.5)
    nested = {"inside": str(encoder.config), "time": "timestep"}
    around = condmod.create_encoder({"name": "fuse", "inputs": nested, "drop": 0.5})
    assert dropping(around).together == pytest.approx(0.5 + 0.5 * 0.32)
    nn.init.constant_(encoder.inputs["label"].null, 100.0)
    nn.init.constant_(encoder.inputs["text"].null, 100.0)
    out = encoder({"label": torch.zeros(20_000).long(), "text": torch.zeros(20_000, 5)})
    assert (out[:, 0] > 150).double().mean() == pytest.approx(0.32, abs=0.01)


def test_encoders_that_each_draw_for_themselves_are_told():
    spec = "multi_condition(encoder=label(classes=3, nullable=True, drop=0.1))"
    model = nn.ModuleList(condmod.create(spec, features=8) for _ in range(2))
    assert condmod.lint(model)[0].places == ("0.encoder", "1.encoder")
    both = nn.ModuleList([fuse(NULL, NULL, drop=0.1), fuse(NULL, NULL, drop=0.1)])
    (only,) = condmod.lint(both)
    assert len(only.places) == 4
    assert only.what.startswith("they are dropped by several draws, at 0.1, so that 1% of")
    shared = nn.ModuleList([model[0], copy.copy(model[0])])
    assert told(shared) == []
    assert told(nn.ModuleList([model[0], copy.deepcopy(model[0]).requires_grad_(False)])) == []


# optimizers


def test_weight_decay_on_what_it_does_not_suit_is_told():
    model = nn.ModuleDict(
        {
            "block": Block(),
            "label": condmod.create_encoder("label(classes=3, nullable=True)"),
            "film": condmod.create("film(init='identity')", features=8, condition_dim=4),
        }
    )
    mend = "make the optimizer from condmod.parameter_groups(model)"
    assert told(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1)) == [
        "weight-decay at block.modulator.proj.weight, film.proj.weight, film.proj.bias: "
        "weight_decay=0.1: it starts at a constant, and decay holds it at 0 or pulls it off; "
        f"{mend}",
        "weight-decay at label.null: weight_decay=0.1: it is a learned null, and decay pulls it "
        f"to zeros, which are no absence; {mend}",
        "weight-decay at label.table: weight_decay=0.1: it is a table or a factor, and decay "
        f"pulls at it where no sample uses it, too; {mend}",
    ]
    groups = condmod.parameter_groups(model, weight_decay=0.1)
    assert told(model, torch.optim.AdamW(groups)) == []
    assert told(model, torch.optim.AdamW(model.parameters(), weight_decay=0.0)) == []


def test_weight_decay_on_weights_that_start_at_random_is_no_finding():
    model = condmod.create("film", features=8, condition_dim=4)
    assert told(model, torch.optim.AdamW(model.parameters())) == []


class OwnConfig(condmod.ModulatorConfig):
    pass


class Own(condmod.Modulator):
    """y = inner(x, c) + bias, with a start of its own for what it holds."""

    name = "acme.own"
    Config = OwnConfig
    kinds = frozenset({"global"})

    def __init__(self, config, site):
        super().__init__(config, site)
        self.inner = condmod.create("film", site)
        self.bias = nn.Parameter(torch.empty(site.features))
        self.reset_parameters()

    def reset_parameters(self):
        self.inner.reset_parameters()
        for parameter in (self.inner.proj.weight, self.bias):
            nn.init.zeros_(parameter)

    def generate(self, condition):
        return self.inner.generate(condition)

    def modulate(self, x, modulation):
        return self.inner.modulate(x, modulation) + self.bias


def test_a_component_that_holds_another_says_how_both_start():
    model = Own(OwnConfig(), Site(8, 4))
    assert told(model, fresh=True) == []
    (only,) = condmod.lint(model, torch.optim.AdamW(model.parameters()))
    assert only.places == ("inner.proj.weight",)
    model.inner.reset_parameters()
    assert condmod.lint(model, fresh=True)[0].places == ("inner.proj.weight",)


def test_parameters_that_a_component_was_not_built_with_are_not_compared():
    model = condmod.create("timestep_table(steps=4, init='identity')", features=8)
    model.table = nn.Parameter(torch.randn(6, 16))
    assert told(model, fresh=True) == []


def test_what_the_optimizer_does_not_hold_is_told():
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    site = attached(model, {"0": "film"}, freeze="none")
    (only,) = condmod.lint(site, optimizer)
    assert only.rule == "not-trained"
    assert only.what == "it requires a gradient, and the optimizer does not hold it"
    assert only.mend == "make the optimizer after attaching, from condmod.parameter_groups(model)"
    assert only.places == (
        "bank.groups.0.modulators.0.proj.weight",
        "bank.groups.0.modulators.0.proj.bias",
    )
    site.bank.requires_grad_(False)
    assert told(site, optimizer) == []


def test_an_optimizer_may_leave_out_the_rest_of_the_model():
    site = attached(nn.Sequential(nn.Linear(8, 8)), {"0": "film"}, freeze="none")
    groups = condmod.parameter_groups(site.bank)
    assert told(site, torch.optim.AdamW(groups)) == []


# the list, and what lint leaves alone


def test_what_is_found_prints_a_line_each_and_is_empty_where_nothing_is():
    model = Block(closed=True).bfloat16()
    found = condmod.lint(model)
    assert [finding.rule for finding in found] == ["double-zero", "half-precision"]
    assert str(found) == repr(found) == "\n".join(map(str, found))
    assert isinstance(found[0], condmod.Finding)
    clean = condmod.lint(Block())
    assert clean == []
    assert not clean
    assert str(clean) == "nothing found"


def test_many_places_are_told_in_one_line():
    model = nn.ModuleList(
        nn.ModuleDict({name: condmod.create("film", features=4, condition_dim=4) for name in "abc"})
        for _ in range(12)
    ).bfloat16()
    (only,) = told(model)
    start = "half-precision at *.a.proj.weight (12), *.a.proj.bias (12), *.b.proj.weight (12) and 3"
    assert only.startswith(f"{start} more: it trains")
    assert len(condmod.lint(model)[0].places) == 72


def test_lint_changes_nothing_and_draws_no_random_number():
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.InstanceNorm1d(8, track_running_stats=True))
    sequence = nn.Sequential(mlp(closed=True), nn.LayerNorm(8))
    calls = []
    for module in (*model, *sequence):
        module.register_forward_hook(lambda *_: calls.append(1))
    site = attached(model, {"0": "film"})
    around = attached(sequence, {"0": "adaln_zero", "1": "adaln"}, start="published")
    both = nn.ModuleList([site, around]).train()
    site.base[1].eval()
    state = {key: value.clone() for key, value in both.state_dict().items()}
    modes = [module.training for module in both.modules()]
    classes = [type(module) for module in both.modules()]
    before = torch.get_rng_state()
    found = condmod.lint(both, torch.optim.AdamW(both.parameters()))
    assert {finding.rule for finding in found} >= {"undone-by-norm", "double-zero", "normed-twice"}
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[key]) for key, value in both.state_dict().items())
    assert modes == [module.training for module in both.modules()]
    assert classes == [type(module) for module in both.modules()]
    assert all(parameter.grad is None for parameter in both.parameters())
    assert calls == []


def test_a_compiled_model_is_read_through():
    model = Block(closed=True)
    model.apply(xavier)
    nn.init.zeros_(model.modulator.proj.weight)
    nn.init.zeros_(model.feedforward[2].weight)
    wrapped = torch.compile(nn.ModuleDict({"block": model}), backend="eager")
    assert told(wrapped) == [f"double-zero at block: {ZERO}"]
    film = condmod.create("film", features=8, condition_dim=4).bfloat16()
    half = torch.compile(film, backend="eager")
    film.proj = torch.compile(film.proj, backend="eager")
    assert condmod.lint(half)[0].places == ("proj.weight", "proj.bias")


def test_a_compiled_sublayer_is_tried_without_compiling_it():
    graphs = []
    model = Block(closed=True)
    model.feedforward = torch.compile(
        model.feedforward, backend=lambda graph, _: graphs.append(graph) or graph
    )
    assert told(model) == [f"double-zero at adaln_zero: {ZERO}"]
    assert graphs == []


def test_a_model_without_conditioning_has_no_findings():
    model = mlp(closed=True, norm=True).bfloat16()
    assert told(model, torch.optim.AdamW(model.parameters()), fresh=True) == []


# bad input


def refusal(call):
    with pytest.raises(SiteError) as caught:
        call()
    return str(caught.value)


def test_what_is_no_model_is_refused():
    assert refusal(lambda: condmod.lint("film")) == "a model is a torch.nn.Module; got 'film'"


def test_what_is_no_optimizer_of_the_model_is_refused():
    model, other = Block(), Block()
    assert refusal(lambda: condmod.lint(model, 0.1)) == (
        "lint(model, optimizer) takes an optimizer with param_groups; got 0.1"
    )
    assert refusal(lambda: condmod.lint(model, torch.optim.AdamW(other.parameters()))) == (
        "the optimizer holds no parameter of this model: it was made for another, or before this "
        "one was copied; make it from condmod.parameter_groups(model)"
    )


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_fresh_is_refused_where_the_optimizer_has_taken_steps(kind):
    model = Block()
    optimizer = kind(condmod.parameter_groups(model), lr=0.1)
    assert told(model, optimizer, fresh=True) == []
    model(torch.randn(2, 8), torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert refusal(lambda: condmod.lint(model, optimizer, fresh=True)) == (
        "fresh=True says that nothing is trained yet, and the optimizer has taken steps; leave "
        "fresh out"
    )
    assert told(model, optimizer) == []
