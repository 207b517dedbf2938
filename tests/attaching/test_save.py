"""Adapters: what is saved attaches again, and what does not fit says so and touches nothing."""

import copy
import json
import re

import pytest
import torch
from safetensors import safe_open
from torch import nn

import condmod
from condmod.attaching.conditioned import Conditioned
from condmod.errors import CheckpointError, SiteError, UnknownNameError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.mlp(self.norm1(x))


class Net(nn.Module):
    def __init__(self, blocks=2, width=8):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(8, width)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


PATTERNS = {
    "blocks.*.norm1": "film",
    "blocks.*.mlp": "adaln_zero",
    "head": ("dense_film", "input"),
}
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
C = torch.randn(2, 4, generator=torch.Generator().manual_seed(3))


def model(blocks=2, width=8):
    torch.manual_seed(0)
    return Net(blocks, width)


def drawn(conditioned):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in conditioned.bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return conditioned


@pytest.fixture
def saved(tmp_path):
    conditioned = drawn(condmod.attach(model(), PATTERNS, condition_dim=4))
    conditioned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", conditioned(X, condition=C)


def edit(folder, **changes):
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_adapter_attaches_again(saved):
    folder, want = saved
    state = torch.random.get_rng_state()
    conditioned = condmod.load_pretrained(model(), folder)
    assert isinstance(conditioned, Conditioned)
    assert torch.equal(conditioned(X, condition=C), want)
    assert not any(p.requires_grad for p in conditioned.base.parameters())
    torch.random.set_rng_state(state)


def test_loading_draws_no_random_number(saved):
    base = model()
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    condmod.load_pretrained(base, saved[0])
    assert torch.equal(torch.rand(1), want)


def test_an_adapter_holds_the_bank_alone(saved):
    folder, _ = saved
    assert {path.name for path in folder.iterdir()} == {"checkpoint.json", "tensors.safetensors"}
    with safe_open(folder / "tensors.safetensors", "pt") as file:
        keys = set(file.keys())
    assert keys == {
        *(
            f"groups.0.modulators.blocks/{i}/norm1.proj.{k}"
            for i in (0, 1)
            for k in ("weight", "bias")
        ),
        *(
            f"groups.1.modulators.blocks/{i}/mlp.proj.{k}"
            for i in (0, 1)
            for k in ("weight", "bias")
        ),
        *(f"groups.2.modulators.head.proj.{k}" for k in ("weight", "bias")),
    }


def test_the_document_tells_specs_sites_base_and_plugins(saved):
    document = json.loads((saved[0] / "checkpoint.json").read_text())
    assert document["kind"] == "attachment"
    assert document["components"] == dict.fromkeys(
        ["adaln_zero", "dense_film", "film"], f"condmod {condmod.__version__}"
    )
    assert document["base"]["model"] == "Net"
    assert document["sites"][0] == {
        "name": "blocks.0.norm1",
        "module": "LayerNorm",
        "pattern": "blocks.*.norm1",
        "spec": "film(init='identity')",
        "placement": "output",
        "features": 8,
        "out_features": None,
        "channel_dim": -1,
        "condition_dim": 4,
        "argument": "input",
        "item": 0,
    }


def test_nested_components_are_told_with_their_provenance(tmp_path):
    encoder = "fuse(inputs={'time': timestep, 'label': label(classes=3)})"
    conditioned = condmod.attach(model(), {"head": "film"}, encoder=encoder)
    conditioned.save_pretrained(tmp_path / "a")
    document = json.loads((tmp_path / "a" / "checkpoint.json").read_text())
    assert sorted(document["components"]) == ["film", "fuse", "label", "timestep"]
    again = condmod.load_pretrained(model(), tmp_path / "a")
    signals = {"time": torch.tensor([1.0, 5.0]), "label": torch.tensor([0, 2])}
    assert torch.equal(again(X, condition=signals), conditioned(X, condition=signals))


def test_a_half_precision_bank_comes_back_in_half_precision(tmp_path):
    conditioned = drawn(condmod.attach(model(), PATTERNS, condition_dim=4))
    conditioned.bank.to(torch.bfloat16)
    conditioned.save_pretrained(tmp_path / "a")
    again = condmod.load_pretrained(model(), tmp_path / "a")
    assert {p.dtype for p in again.bank.parameters()} == {torch.bfloat16}


def test_two_adapters_are_loaded_under_two_names(saved):
    base = model()
    condmod.load_pretrained(base, saved[0], name="one")
    with pytest.raises(SiteError, match=r"^the model has an attachment 'one'; detach it"):
        condmod.load_pretrained(base, saved[0], name="one")
    assert condmod.load_pretrained(base, saved[0], name="two").name == "two"


def test_trained_parameters_of_the_base_are_told_of(tmp_path):
    conditioned = condmod.attach(model(), {"head": "film"}, condition_dim=4, freeze=["blocks.*"])
    with pytest.warns(
        UserWarning,
        match=re.escape(
            "2 parameters of the base train too (head.weight, head.bias, ...) and are no part of "
            "the adapter; save them with conditioned.base.state_dict()"
        ),
    ):
        conditioned.save_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda net: net.blocks[1].mlp[0].weight.data.mul_(2), "weights"),
        (lambda net: net.register_buffer("extra", torch.zeros(3)), "layout (names and shapes of"),
    ],
)
def test_a_base_that_differs_is_warned_of(saved, change, what):
    base = model()
    change(base)
    with pytest.warns(UserWarning, match=f"^{re.escape(f'the model differs in its {what}')}"):
        condmod.load_pretrained(base, saved[0])


@pytest.mark.parametrize(
    ("base", "error"),
    [
        (
            lambda: model(blocks=1),
            "is for another model than this Net: missing: blocks.1.mlp, blocks.1.norm1",
        ),
        (
            lambda: model(blocks=3),
            "is for another model than this Net: unexpected: blocks.2.norm1, blocks.2.mlp",
        ),
        (
            lambda: nn.ModuleDict({"head": nn.Linear(4, 4), "blocks": model().blocks}),
            "is for another model than this ModuleDict: head has 4 features, not 8",
        ),
    ],
)
def test_another_model_is_refused_with_what_is_missing_and_unexpected(saved, base, error):
    other = base()
    before = copy.deepcopy(other)
    with pytest.raises(CheckpointError, match=f"{re.escape(error)}$"):
        condmod.load_pretrained(other, saved[0])
    assert [vars(m).keys() for m in other.modules()] == [vars(m).keys() for m in before.modules()]
    assert [type(m) for m in other.modules()] == [type(m) for m in before.modules()]


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (
            lambda folder: (folder / "checkpoint.json").write_text("{"),
            "checkpoint.json is not readable JSON: ",
        ),
        (lambda folder: (folder / "tensors.safetensors").write_bytes(b"no"), "is truncated or for"),
        (lambda folder: edit(folder, kind="run"), "holds no attachment, but 'run'"),
        (lambda folder: edit(folder, start="now"), "is damaged: start: Input should be 'base' or "),
        (lambda folder: edit(folder, sites=[{}]), "is damaged: sites.0.name: Field required"),
        (lambda folder: edit(folder, extra=1), "is damaged: extra: Extra inputs are not permitted"),
        (lambda folder: edit(folder, encoder="label("), "is damaged: "),
        (lambda folder: edit(folder, format=99), "has checkpoint format 99; this condmod reads 1"),
    ],
)
def test_a_corrupt_or_foreign_folder_is_refused(saved, damage, error):
    folder, _ = saved
    damage(folder)
    base = model()
    with pytest.raises(CheckpointError, match=re.escape(error)):
        condmod.load_pretrained(base, folder)
    assert type(base.head) is nn.Linear


@pytest.mark.parametrize("folder", ["somebody/adapter", None, 3])
def test_what_is_no_folder_says_what_to_give(folder):
    with pytest.raises(
        CheckpointError, match=r"is no folder; give the one that save_pretrained wro"
    ):
        condmod.load_pretrained(model(), folder)


def test_missing_tensors_leave_the_model_untouched(saved):
    folder, _ = saved
    checkpoint = condmod.serialization.load_checkpoint(folder)
    tensors = dict(list(checkpoint.tensors.items())[1:])
    condmod.serialization.save_checkpoint(folder, tensors, checkpoint.document)
    base = model()
    with pytest.raises(CheckpointError, match=r"^the tensors in .* do not fit: missing groups\."):
        condmod.load_pretrained(base, folder)
    assert type(base.head) is nn.Linear
    assert all(p.requires_grad for p in base.parameters())


def test_a_component_that_is_not_installed_is_named_with_where_it_came_from(saved):
    folder, _ = saved
    document = json.loads((folder / "checkpoint.json").read_text())
    sites = [{**site, "spec": "acme.gate"} for site in document["sites"]]
    edit(folder, sites=sites, components={"acme.gate": "acme-gate 1.2"})
    with pytest.raises(UnknownNameError, match=r"the adapter was saved with acme-gate 1\.2$"):
        condmod.load_pretrained(model(), folder)


def test_an_expression_from_a_file_is_not_run(tmp_path):
    conditioned = condmod.attach(model(), {"re:head": "film"}, condition_dim=4)
    conditioned.save_pretrained(tmp_path / "a")
    document = json.loads((tmp_path / "a" / "checkpoint.json").read_text())
    site = {**document["sites"][0], "pattern": "re:(h+)+$("}  # no expression at all
    edit(tmp_path / "a", sites=[site])
    assert condmod.load_pretrained(model(), tmp_path / "a").plan.sites[0].site.name == "head"


def test_the_hub_is_asked_through_its_own_client(saved, monkeypatch):
    from huggingface_hub.errors import OfflineModeIsEnabled

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    conditioned = condmod.load_pretrained(model(), saved[0])
    with pytest.raises(OfflineModeIsEnabled):
        conditioned.push_to_hub("somebody/adapter")


def test_the_hub_gets_what_save_writes(saved, monkeypatch, tmp_path):
    import huggingface_hub

    sent = {}

    def upload(self, *, repo_id, folder_path, **options):
        sent.update(options, repository=repo_id)
        sent["files"] = sorted(path.name for path in tmp_path.__class__(folder_path).iterdir())
        return "address"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **_: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    conditioned = condmod.load_pretrained(model(), saved[0])
    assert conditioned.push_to_hub("somebody/adapter", commit_message="first") == "address"
    assert sent == {
        "repository": "somebody/adapter",
        "commit_message": "first",
        "files": ["checkpoint.json", "tensors.safetensors"],
    }
