"""Where an attachment could go wrong without a word: each is right, or an error."""

import copy
import itertools
import json
import re
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import condmod
from condmod.errors import CheckpointError, ConditionError, FoldError, SiteError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
C = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
ONE = C[:1]


def drawn(conditioned):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in conditioned.bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return conditioned


def linear(*sizes):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def attached(model, patterns=None, **options):
    return drawn(condmod.attach(model, patterns or {"0": "film"}, condition_dim=5, **options))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = checkpoint(lambda z: torch.tanh(self.a(z)), x, use_reentrant=False)
        return self.b(torch.sin(h))


def test_a_context_is_entered_once():
    conditioned = attached(linear(4, 8))
    context = conditioned.condition(C)
    with context:
        pass
    with pytest.raises(ConditionError, match=r"^the context of a condition is entered once; call "):
        context.__enter__()


def test_two_contexts_made_before_either_is_entered_are_not_both_entered():
    conditioned = attached(linear(4, 8))
    one, two = conditioned.condition(C), conditioned.condition(2 * C)
    with one, pytest.raises(ConditionError, match="already has a condition, or is switched off"):
        two.__enter__()


def test_contexts_of_two_attachments_may_close_in_any_order():
    model = Checkpointed()
    one = attached(model, {"a": "film"}, name="one")
    two = attached(model, {"b": "film"}, name="two")
    gradients = []
    for first_out in (0, 1):
        x = X.clone().requires_grad_()
        contexts = [one.condition(C), two.condition(2 * C)]
        for context in contexts:
            context.__enter__()
        y = model(x)
        for context in (contexts[first_out], contexts[1 - first_out]):
            context.__exit__(None, None, None)
        gradients.append(torch.autograd.grad(y.sum(), x)[0])
        with pytest.raises(ConditionError, match="has no condition"):
            model(X)
    assert torch.equal(*gradients)


def test_a_context_is_left_in_its_own_thread():
    conditioned = attached(linear(4, 8))
    context = conditioned.condition(C)
    context.__enter__()
    raised = []

    def leave():
        try:
            context.__exit__(None, None, None)
        except ConditionError as error:
            raised.append(str(error))

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert raised == ["the context of a condition is left in the thread that entered it"]
    context.__exit__(None, None, None)


def test_a_strength_without_a_condition_is_an_error():
    conditioned = attached(linear(4, 8))
    with (
        conditioned.condition(C),
        pytest.raises(ConditionError, match=r"^a strength is given beside a condition; say both, "),
    ):
        conditioned(X, strength=0.0)


def test_the_bank_follows_the_mode_that_a_loop_sets_on_the_bare_model():
    model = linear(4, 8)
    encoder = "vector(features=7, nullable=True, drop=0.5)"
    conditioned = condmod.attach(model, {"0": "film"}, encoder=encoder, condition_dim=8)
    drawn(conditioned)
    model.eval()
    signal = torch.randn(64, 7)
    outputs = []
    for _ in range(2):
        with conditioned.condition(signal):
            outputs.append(model(torch.ones(64, 4)))
    assert torch.equal(*outputs)
    model.train()
    with conditioned.condition(signal):
        assert not torch.equal(model(torch.ones(64, 4)), outputs[0])


def test_frames_reach_sites_of_both_layouts():
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Conv1d(4, 4, 1), "last": nn.Linear(4, 4)})
    conditioned = condmod.attach(
        model, {"*": "film"}, encoder="vector(features=6)", condition_dim=4
    )
    drawn(conditioned)
    frames, x = torch.randn(2, 4, 6), torch.randn(2, 4, 4)  # as many frames as channels
    encoded = conditioned.bank.encoder(frames)
    modulators = conditioned.bank.modulators()
    plain = condmod.detach(copy.deepcopy(model))
    with conditioned.condition(frames):
        first, last = model["first"](x), model["last"](x)
    assert torch.equal(last, modulators["last"](plain["last"](x), encoded))
    assert torch.equal(first, modulators["first"](plain["first"](x), encoded.mT))


def test_a_layer_inside_a_block_with_its_batch_at_dim_1_is_refused():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False
    )
    text = (
        "no site can stand at 'layers.0.norm1': it lies in a TransformerEncoderLayer with "
        "batch_first=False, which has its batch at dim 1"
    )
    with pytest.raises(SiteError, match=f"^{re.escape(text)}$"):
        condmod.plan(model, {"layers.*.norm1": "film"}, condition_dim=5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_layer_that_is_compiled_is_conditioned_inside():
    model = linear(4, 8, 3)
    want = attached(copy.deepcopy(model))(X, condition=C)
    model[0] = torch.compile(model[0], backend="eager")
    conditioned = attached(model)
    torch.testing.assert_close(conditioned(X, condition=C), want)


def test_a_container_with_a_forward_of_its_own_is_not_taken_for_its_base():
    class Sum(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    for container in (
        Sum(nn.Linear(4, 4)),
        type("Own", (nn.ModuleList,), {"forward": Sum.forward})(),
    ):
        with pytest.raises(SiteError, match="nothing is known of the class"):
            condmod.plan(nn.ModuleDict({"it": container}), {"it": "film"}, condition_dim=5)


def test_a_width_that_another_layer_happens_to_have_is_no_channel():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(24, 3, 1))

        def forward(self, x):
            return nn.functional.conv1d(x, self.weight)

    model = nn.Sequential(Conv(), nn.Flatten(), nn.Linear(24 * 64, 64), nn.Linear(64, 2))
    with pytest.raises(SiteError, match="may have its channels at dim 1 or last"):
        condmod.plan(model, {"0": "film"}, condition_dim=5, example=torch.randn(2, 3, 64))


def test_attach_that_fails_half_way_for_any_reason_leaves_nothing():
    class Final(nn.Linear):
        def __init_subclass__(cls, **kwargs):
            raise RuntimeError("no subclass")

    model = nn.Sequential(nn.Linear(4, 8), Final(8, 3))
    with pytest.raises(SiteError, match="cannot be conditioned: RuntimeError: no subclass"):
        attached(model, {"0": "film", "1": ("film", condmod.Site(3))})
    assert [type(layer) for layer in model] == [nn.Linear, Final]


def test_detach_without_the_handle():
    model = linear(4, 8, 3)
    want = model(X)
    attached(model, name="one")
    attached(model, {"1": "film"}, name="two")
    assert condmod.detach(model, "one") is model
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is not nn.Linear
    condmod.detach(model)
    assert torch.equal(model(X), want)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batch_norms_come_back_as_they_were():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8)).train()
    model[1].eval()
    one, two = attached(model, name="one"), attached(model, {"1": "film"}, name="two")
    one.detach()
    assert not model[2].training  # two still freezes it
    two.detach()
    assert [norm.training for norm in model[1:]] == [False, True]


def test_a_plan_is_attached_to_a_model_of_its_sizes():
    plan = condmod.plan(linear(4, 8), {"0": "film"}, condition_dim=5)
    with pytest.raises(SiteError, match=r"^the plan has 8 features at '0', the model 9$"):
        condmod.attach(linear(4, 9), plan)
    with pytest.raises(
        SiteError, match=r"^a plan has its condition_dim, encoder, example and start"
    ):
        condmod.attach(linear(4, 8), plan, start="published")


def test_parameters_are_counted_whatever_modules_are_called():
    model = nn.ModuleDict({"encoder": nn.Linear(4, 8), "head": nn.Linear(8, 3)})
    plan = condmod.plan(
        model, {"encoder": "film", "head": "cnaps"}, encoder="label(classes=3)", condition_dim=5
    )
    conditioned = condmod.attach(model, plan)
    assert plan.parameters().total == sum(p.numel() for p in conditioned.bank.parameters())


def residual():
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    return nn.Sequential(Residual(nn.Linear(4, 4)))


def tied():
    model = linear(4, 4, 4)
    model[1].weight = nn.Parameter(model[0].weight.data)  # another object, the same values
    return model


def old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 8)))


@pytest.mark.parametrize(
    ("model", "patterns", "reason"),
    [
        (
            lambda: nn.Sequential(linear(4, 8, 8)),
            {"0": "film", "0.1": "film"},
            "0: another site acts where it would go",
        ),
        (
            residual,
            {"0": ("film", condmod.Site(4))},
            "0: a Residual has no weight of its own that a scale and shift of what it gives could "
            "go into",
        ),
        (tied, {"0": "film"}, "0: its weight is shared: 0.weight, 1.weight"),
        (
            old_weight_norm,
            {"0": "film"},
            "0: the weight of the Linear is made of other parameters",
        ),
    ],
    ids=["nested sites", "a residual", "tied", "weight norm"],
)
def test_what_would_fold_wrongly_is_refused(model, patterns, reason):
    conditioned = attached(model(), patterns)
    with pytest.raises(FoldError, match=f"{re.escape(reason)}"):
        conditioned.fold(ONE)


def test_an_outer_attachment_does_not_fold_through_an_inner_one():
    model = nn.Sequential(linear(4, 8))
    attached(model, {"0.0": "film"}, name="inner")
    outer = attached(model, name="outer")
    with pytest.raises(FoldError, match="0: another site acts where it would go"):
        outer.fold(ONE)


def test_weights_that_changed_since_a_fold_are_not_overwritten():
    model = linear(4, 8)
    conditioned = attached(model)
    conditioned.fold(ONE)
    with torch.no_grad():
        model[0].bias.add_(1)
    held = copy.deepcopy(model.state_dict())
    with pytest.raises(
        FoldError, match="has changed since the fold, by training or by a later fol"
    ):
        conditioned.unfold()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in held.items())


def test_a_fold_changes_no_running_statistics_and_a_folded_model_is_not_saved(tmp_path):
    conditioned = condmod.attach(
        linear(4, 8), {"0": "biggan_batch_norm"}, condition_dim=5, start="published"
    ).train()
    before = copy.deepcopy(conditioned.bank.state_dict())
    conditioned.fold(ONE)  # in evaluation it is a fixed scale and shift
    assert conditioned.bank.training
    assert all(torch.equal(conditioned.bank.state_dict()[k], v) for k, v in before.items())
    folded = attached(linear(4, 8))
    with pytest.raises(ConditionError, match=r"^the condition is torch\.float64"):
        folded.fold(ONE.double())
    folded.fold(ONE)
    with pytest.raises(
        FoldError, match=r"^the attachment 'default' is folded; call unfold\(\) first$"
    ):
        folded.save_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"pattern": "*a" * 30}, "is damaged: '*a*a"),
        ({"pattern": "a..b"}, "is damaged: 'a..b' is no pattern"),
        ({"condition_dim": 10**12}, "is damaged: sites.0.condition_dim: Input should be less than"),
        (
            {"condition_dim": 10**6},
            "do not fit: groups.0.modulators.0.proj.weight is (16, 5), not ",
        ),
        (
            {"placement": "around"},
            "is damaged: film turns features into features, so its placement",
        ),
        ({"item": -5}, "is damaged: sites.0.item: Input should be greater than or equal to 0"),
        (
            {"features": 0},
            "is damaged: sites.0.features: Input should be greater than or equal to 1",
        ),
        (None, "is damaged: two sites have one name"),
        ([], "is damaged: sites: List should have at least 1 item"),
    ],
    ids=str,
)
def test_a_forged_document_is_refused_before_anything_is_built(tmp_path, change, error):
    attached(linear(4, 8)).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "checkpoint.json"
    document = json.loads(path.read_text())
    (site,) = document["sites"]
    document["sites"] = [site, site] if change is None else [site | change] if change else []
    path.write_text(json.dumps(document))
    model = linear(4, 8)
    with pytest.raises(CheckpointError, match=re.escape(error)):
        condmod.load_pretrained(model, tmp_path / "a")
    assert type(model[0]) is nn.Linear


def test_two_sites_of_a_file_that_are_one_module_here_are_refused(tmp_path):
    attached(linear(4, 4, 4), {"*": "film"}).save_pretrained(tmp_path / "a")
    model = linear(4, 4, 4)
    model[1] = model[0]
    with pytest.raises(SiteError, match=r"^'0' and '1' are one module, which has one site$"):
        condmod.load_pretrained(model, tmp_path / "a")


def test_a_bank_of_several_dtypes_comes_back(tmp_path):
    conditioned = condmod.attach(
        linear(4, 8), {"0": "film"}, encoder="label(classes=3)", condition_dim=5
    )
    conditioned.bank.groups.bfloat16()
    conditioned.save_pretrained(tmp_path / "a")
    again = condmod.load_pretrained(linear(4, 8), tmp_path / "a")
    kinds = {name: p.dtype for name, p in conditioned.bank.named_parameters()}
    assert {name: p.dtype for name, p in again.bank.named_parameters()} == kinds
    assert len(set(kinds.values())) == 2


@pytest.mark.parametrize("spec", ["adaln_zero", "stylegan2", "film"])
def test_a_strength_is_taken_under_autocast_and_0_is_the_base(spec):
    torch.manual_seed(0)
    net, x, c = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8), torch.randn(4, 6)
    conditioned = condmod.attach(net, {"0": spec}, condition_dim=6, start="published")
    with torch.autocast("cpu", torch.bfloat16):
        full = conditioned(x, condition=c, strength=1.0)
        none = conditioned(x, condition=c, strength=0.0)
        torch.testing.assert_close(
            full, conditioned(x, condition=c), rtol=1e-2, atol=1e-2, check_dtype=False
        )
        with conditioned.disabled():
            assert torch.equal(none, net(x))
    assert none.dtype == torch.bfloat16
    assert not torch.equal(none, full)
