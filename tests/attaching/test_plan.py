"""What a plan says, and which wishes it refuses; it touches nothing."""

import copy
import json
import re

import pytest
import torch
from torch import nn

import condmod
from condmod.errors import SiteError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.mlp(self.norm1(x))


class Odd(nn.Module):
    """A layer that nothing knows, around one that is known."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 1)

    def forward(self, x):
        return self.conv(x.mT).mT.relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.odd = Odd()
        self.act = nn.ReLU()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.act(self.odd(x))
        return self.head(x + self.attention(x, x, x)[0])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_a_plan_prints_an_aligned_table(net):
    made = condmod.plan(
        net, {"blocks.*.norm1": "film", "head": ("dense_film", "input")}, condition_dim=4
    )
    head, *rows, total = str(made).splitlines()
    ends = "placement  features  channels  parameters"
    assert head == f"site              module     spec                         {ends}"
    assert rows == [
        "blocks.0-1.norm1  LayerNorm  film(init='identity')        "
        "output            8  last          2 x 80",
        "head              Linear     dense_film(init='identity')  "
        "input             8  last              80",
    ]
    assert total == "3 sites, condition_dim 4, 240 parameters (22.84% of the model's)"


def test_a_plan_says_numbers_as_ranges_or_counts_and_the_encoder_below():
    net = nn.ModuleDict(
        {
            "a": nn.ModuleList(nn.ModuleList(nn.LayerNorm(8) for _ in range(2)) for _ in range(2)),
            "b": nn.ModuleDict({str(i): nn.LayerNorm(8) for i in (0, 2, 5)}),
            "n1": nn.LayerNorm(8),
            "n2": nn.LayerNorm(8),
        }
    )
    made = condmod.plan(
        net, {"type:LayerNorm": "film"}, encoder="label(classes=5)", condition_dim=6
    )
    lines = str(made).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["a.*.*", "b.*", "n1", "n2"]
    assert lines[1].startswith("a.*.* (4)  LayerNorm")
    assert lines[2].startswith("b.* (3)    LayerNorm")
    assert lines[5] == "encoder label(classes=5), 30 parameters"
    assert lines[6].startswith("9 sites, condition_dim 6, 1,038 parameters (7.2 times the model's)")


def test_a_plan_gives_json(net):
    made = condmod.plan(net, {"head": "film"}, encoder="label(classes=5)", condition_dim=6)
    assert json.loads(json.dumps(made.to_dict())) == {
        "condition_dim": 6,
        "encoder": "label(classes=5)",
        "start": "base",
        "base_parameters": 1051,
        "parameters": 42 + 30,
        "sites": [
            {
                "name": "head",
                "module": "Linear",
                "pattern": "head",
                "spec": "film(init='identity')",
                "placement": "output",
                "features": 3,
                "out_features": None,
                "channel_dim": -1,
                "condition_dim": 6,
                "argument": "input",
                "item": 0,
                "parameters": 42,
            }
        ],
    }


def test_a_plan_touches_nothing(net):
    before = copy.deepcopy(net.state_dict())
    condmod.plan(net, {"odd": "film"}, condition_dim=4, example=torch.randn(2, 5, 8))
    assert all(not hasattr(m, "_condmod_sites") and m.training for m in net.modules())
    assert not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("model", ["vit", nn.Linear])
def test_what_is_no_model_says_so(model):
    for function in (condmod.plan, condmod.attach):
        with pytest.raises(SiteError, match=r"^a model is a torch\.nn\.Module; got "):
            function(model, {"head": "film"}, condition_dim=4)


def test_planning_draws_no_random_number(net):
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    condmod.plan(net, {"head": "film"}, condition_dim=4)
    assert torch.equal(torch.rand(1), want)


def test_an_example_shows_what_no_class_tells(net):
    example = torch.randn(2, 5, 8)
    made = condmod.plan(net, {"odd": "film"}, condition_dim=4, example=example)
    assert [(p.site.features, p.site.channel_dim) for p in made] == [(8, -1)]
    with pytest.raises(
        SiteError, match=r"\(2, 5, 8\) on the example may have its channels at dim 1"
    ):
        condmod.plan(net, {"act": "film"}, condition_dim=4, example=example)  # nobody tells


def test_an_example_in_training_mode_leaves_running_statistics():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.ReLU())
    before = model[1].running_mean.clone()
    condmod.plan(model, {"2": "film"}, condition_dim=4, example=torch.randn(4, 2, 7))
    assert torch.equal(model[1].running_mean, before)
    assert model[1].num_batches_tracked == 0
    assert model.training


def test_channels_first_features_are_seen_on_an_example():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU())
    made = condmod.plan(model, {"1": "film"}, condition_dim=4, example=torch.randn(2, 3, 5, 6))
    assert made.sites[0].site == condmod.Site(6, 4, 1, name="1")


def test_features_may_be_said_by_hand(net):
    made = condmod.plan(net, {"odd": ("film", "input", condmod.Site(8))}, condition_dim=4)
    assert made.sites[0].placement == "input"
    assert made.sites[0].site == condmod.Site(8, 4, name="odd")
    assert made.sites[0].argument == "x"


def test_the_published_start_keeps_the_spec(net):
    made = condmod.plan(net, {"head": "film"}, condition_dim=4, start="published")
    assert str(made.sites[0].config) == "film"


def test_one_sublayer_is_understood_where_nothing_else_is_said(net):
    made = condmod.plan(net, {"blocks.*.mlp": "adaln_zero"}, condition_dim=4)
    assert {(str(p.config), p.placement) for p in made} == {
        ("adaln_zero(parts=1, norm='none', residual=False, gate='one_plus')", "around")
    }


def test_options_that_are_said_win(net):
    made = condmod.plan(
        net, {"head": "film(scale='one_plus', init='identity')"}, condition_dim=4, start="base"
    )
    assert str(made.sites[0].config) == "film(scale='one_plus', init='identity')"
    with pytest.raises(SiteError, match=r"^film at 'head' cannot start as the base: it changes f"):
        condmod.plan(net, {"head": "film(init='published')"}, condition_dim=4)


@pytest.mark.parametrize(
    ("patterns", "options", "error"),
    [
        ({}, {}, "patterns are specs by pattern, as in {'blocks.*.norm1': 'film'}; got none"),
        (["head"], {}, "patterns are specs by pattern, as in {'blocks.*.norm1': 'film'}; got list"),
        (
            {"blocks.*.norm1": "film", "blocks.0.*": "film"},
            {"condition_dim": 4},
            "the patterns 'blocks.*.norm1' and 'blocks.0.*' both match 'blocks.0.norm1'; a module "
            "has one site in an attachment: narrow one, or attach twice under two names",
        ),
        (
            {"head": "film"},
            {},
            "film(init='identity') needs the width of its condition: say condition_dim=..., or "
            "encoder=...",
        ),
        (
            {"odd": "film"},
            {"condition_dim": 4},
            "the features at 'odd' (Odd) cannot be inferred: nothing is known of the class "
            f"{__name__}.Odd; give an example=..., or say them: "
            "{'odd': (spec, condmod.Site(features=..., channel_dim=...))}",
        ),
        (
            {"head": "adaln_zero"},
            {"condition_dim": 4},
            "no site can stand at 'head' (around): it turns 8 features into 3, and what acts "
            "around it keeps their number",
        ),
        (
            {"head": ("film", "around")},
            {"condition_dim": 4},
            "film turns features into features, so its placement is 'input' or 'output'; the "
            "pattern 'head' says 'around'",
        ),
        (
            {"blocks.*.mlp": ("adaln_zero", "output")},
            {"condition_dim": 4},
            "adaln_zero acts around a sublayer, so its placement is 'around'; the pattern "
            "'blocks.*.mlp' says 'output'",
        ),
        (
            {"head": ("film", condmod.Site(7))},
            {"condition_dim": 4},
            "the Site of 'head' says features=7, but 'head' (Linear) has 3",
        ),
        (
            {"odd": ("film", condmod.Site(8, 5))},
            {"condition_dim": 4},
            "the Site of 'odd' says condition_dim=5, the attachment 4; say it to plan or attach "
            "alone",
        ),
        (
            {"head": ("film", "input", "output")},
            {"condition_dim": 4},
            "the pattern 'head' has a spec, or a tuple of a spec with a placement ('input', "
            "'output', 'around' or 'weight') or a Site; got 'output'",
        ),
        (
            {"head": "adaln"},
            {"condition_dim": 4},
            "adaln(init='identity') at 'head' cannot start as the base: it changes features from "
            "the start (a norm, a second residual, or a start that is not the identity); choose "
            "one that leaves them, such as film or dense_film, or ask for start='published'",
        ),
        (
            {"blocks.0.norm1": "wavenet_gate"},
            {"condition_dim": 4},
            "wavenet_gate(init='identity') at 'blocks.0.norm1' cannot be checked to start as the "
            "base: wavenet_gate at 'blocks.0.norm1' halves what its sublayer gives, 16 channels at "
            "dim -1; the sublayer turned features (2, 3, 8) into (2, 3, 8); ask for "
            "start='published'",
        ),
        (
            {"head": ("film", "inside")},
            {"condition_dim": 4},
            "the pattern 'head' has a spec, or a tuple of a spec with a placement ('input', "
            "'output', 'around' or 'weight') or a Site; got 'inside'",
        ),
        (
            {"blocks": "film"},
            {"condition_dim": 4},
            "no site can stand at 'blocks' (output): a ModuleList is never called; match what it "
            "holds",
        ),
        (
            {"attention.out_proj": "film"},
            {"condition_dim": 4},
            "the site 'attention.out_proj' would never act: MultiheadAttention reads its "
            "projection's weight and does not call it; place the site on the attention's output",
        ),
        (
            {"attention": ("film", "input")},
            {"condition_dim": 4},
            "no site can stand at 'attention' (input): its query, key and value are three "
            "arguments; place the site on the norm or the projection before it",
        ),
        (
            {"blocks.*.mlp": "adaln_zero(parts=2)"},
            {"condition_dim": 4},
            "adaln_zero serves 2 sublayers at once, and a site is around one module; say "
            "adaln_zero(parts=1)",
        ),
        (
            {"blocks.*.mlp": "sd35"},
            {"condition_dim": 4},
            "sd35 serves 3 sublayers at once, and a site is around one module",
        ),
        (
            {"head": "film(scale='sigmoid')"},
            {"condition_dim": 4},
            "film(scale='sigmoid') cannot start as the base: film: init='identity' needs a scale "
            "of 1, which a sigmoid never reaches; leave that option out, or ask for "
            "start='published'",
        ),
        (
            {"head": "per_timestep"},
            {"encoder": "timestep"},
            "per_timestep(inner=film(init='identity')) has an encoder of its own; leave out "
            "encoder='timestep', or attach what it holds inside",
        ),
        (
            {"head": "film"},
            {"condition_dim": 4, "start": "identity"},
            "start is 'base' or 'published'; got 'identity'",
        ),
        (
            {"unused": "film"},
            {"condition_dim": 4, "example": torch.randn(2, 5, 8)},
            "the site 'unused' would never act: the example does not reach it",
        ),
        (
            {"head": "film"},
            {"condition_dim": 4, "example": torch.randn(2, 5, 7)},
            "the model does not run on the example: RuntimeError: Given normalized_shape=[8]",
        ),
    ],
)
def test_what_cannot_be_planned_says_why_and_what_to_do(net, patterns, options, error):
    with pytest.raises(SiteError, match=f"^{re.escape(error)}"):
        condmod.plan(net, patterns, **options)


@pytest.mark.parametrize(
    ("module", "placement", "features"),
    [
        (nn.Linear(3, 5), "input", (3, -1)),
        (nn.Linear(3, 5), "output", (5, -1)),
        (nn.Conv1d(3, 5, 1), "output", (5, 1)),
        (nn.Conv2d(3, 5, 1), "input", (3, 1)),
        (nn.Conv3d(3, 5, 1), "output", (5, 1)),
        (nn.ConvTranspose2d(3, 5, 1), "output", (5, 1)),
        (nn.Embedding(7, 5), "output", (5, -1)),
        (nn.LayerNorm(5), "output", (5, -1)),
        (nn.RMSNorm(5), "output", (5, -1)),
        (nn.GroupNorm(1, 5), "output", (5, 1)),
        (nn.BatchNorm1d(5), "output", (5, 1)),
        (nn.BatchNorm2d(5), "output", (5, 1)),
        (nn.InstanceNorm2d(5), "output", (5, 1)),
        (nn.MultiheadAttention(4, 2, batch_first=True), "output", (4, -1)),
        (nn.LSTM(3, 5, batch_first=True, bidirectional=True), "output", (10, -1)),
        (nn.GRU(3, 5, batch_first=True), "input", (3, -1)),
        (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), "output", (4, -1)),
        (nn.Sequential(nn.Linear(3, 5), nn.Conv1d(5, 7, 1)), "output", (7, 1)),
        (nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7)), "input", (3, -1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_torchs_own_layers_tell_their_features(module, placement, features):
    made = condmod.plan(nn.ModuleDict({"it": module}), {"it": ("film", placement)}, condition_dim=4)
    assert (made.sites[0].site.features, made.sites[0].site.channel_dim) == features


@pytest.mark.parametrize(
    ("module", "error"),
    [
        (
            nn.MultiheadAttention(4, 2),
            "a MultiheadAttention with batch_first=False has its batch at",
        ),
        (nn.LSTM(3, 5), "a LSTM with batch_first=False has its batch at dim 1"),
        (nn.LayerNorm((3, 4)), "it normalises over 2 axes, not over channels alone"),
        (nn.Sequential(), "an empty Sequential has no features"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_without_channels_at_one_place_are_refused(module, error):
    with pytest.raises(SiteError, match=re.escape(error)):
        condmod.plan(nn.ModuleDict({"it": module}), {"it": "film"}, condition_dim=4)


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_its_base():
    class First(nn.LayerNorm):  # as timm's LayerNorm2d
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    with pytest.raises(SiteError, match=r"nothing is known of the class .*First"):
        condmod.plan(nn.ModuleDict({"it": First(4)}), {"it": "film"}, condition_dim=4)


def test_sites_that_share_a_trunk_are_one_bank(net):
    made = condmod.plan(net, {"blocks.*.norm1": "cnaps"}, condition_dim=4)
    counts = made.parameters()
    assert counts.sites.keys() == {"blocks.0.norm1", "blocks.1.norm1"}
    assert counts.shared.keys() == {"blocks.*.norm1"}
    assert counts.total == sum(counts.sites.values()) + counts.shared["blocks.*.norm1"]
    assert "blocks.*.norm1" in str(made)
