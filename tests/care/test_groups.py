"""Parameter groups: what decays, what does not, and every parameter that trains exactly once."""

import copy

import pytest
import torch
from torch import nn

import condmod
from condmod.errors import SiteError


def grouped(model, **options):
    """Names by group, after a check that every parameter that trains is held once."""
    groups = condmod.parameter_groups(model, **options)
    named = dict(model.named_parameters())
    trains = {name for name, parameter in named.items() if parameter.requires_grad}
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(trains)
    for group in groups:
        assert all(
            parameter is named[name]
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        )
    return {group["name"]: set(group["param_names"]) for group in groups}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.position = nn.Parameter(torch.zeros(1, 3, 8))
        self.norm = nn.LayerNorm([3, 8])
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        h = self.norm(self.embedding(ids) + self.position)
        return self.head(self.attention(h, h, h)[0])


def test_biases_norms_and_embeddings_do_not_decay_and_other_weights_do():
    assert grouped(Model()) == {
        "decay": {
            "position",
            "attention.in_proj_weight",
            "attention.out_proj.weight",
            "head.weight",
        },
        "no_decay": {
            *("embedding.weight", "norm.weight", "norm.bias", "attention.in_proj_bias"),
            *("attention.out_proj.bias", "head.bias"),
        },
    }


def test_zero_initialised_generators_nulls_and_tables_do_not_decay():
    model = nn.ModuleDict(
        {
            "zero": condmod.create("adaln_zero", features=8, condition_dim=4),
            "random": condmod.create("film", features=8, condition_dim=4),
            "identity": condmod.create(
                "concat_project(init='identity')", features=8, condition_dim=4
            ),
            "table": condmod.create("timestep_table(steps=5)", features=8),
            "label": condmod.create_encoder("label(classes=3, nullable=True)"),
            "text": condmod.create_encoder("vector(features=5, nullable=True)"),
            "blocks": condmod.create_bank("adaln_single", {"a": condmod.Site(8, 4)}),
            "edm2": condmod.create("edm2", features=8, condition_dim=4),
        }
    )
    assert grouped(model)["decay"] == {
        *("random.proj.weight", "text.proj.weight", "blocks.shared.proj.weight", "edm2.weight")
    }


def test_what_has_been_trained_keeps_its_group():
    model = condmod.create("adaln_zero", features=8, condition_dim=4)
    before = grouped(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert grouped(model) == before == {"no_decay": {"proj.weight", "proj.bias"}}


def test_a_compiled_layer_keeps_its_group():
    model = condmod.create("adaln_zero", features=8, condition_dim=4)
    model.proj = torch.compile(model.proj, backend="eager")
    assert grouped(model) == {"no_decay": {"proj._orig_mod.weight", "proj._orig_mod.bias"}}


def test_what_is_attached_trains_alone_and_the_base_too_where_it_is_not_frozen():
    model = Model()
    site = condmod.attach(model, {"head": "film", "attention": "dense_film"}, condition_dim=4)
    bank = {f"bank.{name}" for name, _ in site.bank.named_parameters()}
    assert grouped(site) == {"no_decay": bank}
    site.detach()
    site = condmod.attach(model, {"head": "film"}, condition_dim=4, freeze="none")
    assert grouped(site)["decay"] == {f"base.{name}" for name in grouped(model)["decay"]}


def test_a_tied_weight_is_held_once_and_does_not_decay_where_one_of_its_places_says_so():
    model = Model()
    model.head.weight = model.embedding.weight
    assert "embedding.weight" in grouped(model)["no_decay"]
    first = nn.ModuleDict({"head": model.head, "embedding": model.embedding})
    assert "head.weight" in grouped(first)["no_decay"]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_an_optimizer_takes_the_groups_with_their_names_and_decay(kind):
    site = condmod.attach(Model(), {"head": "film"}, condition_dim=4, freeze="none")
    optimizer = kind(condmod.parameter_groups(site, weight_decay=0.1), lr=0.1)
    site(torch.tensor([[0, 1, 2]]), condition=torch.randn(1, 4)).square().sum().backward()
    optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    again = kind(condmod.parameter_groups(copy.deepcopy(site), weight_decay=0.1), lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    names = [group["param_names"] for group in again.state_dict()["param_groups"]]
    assert names == [group["param_names"] for group in optimizer.state_dict()["param_groups"]]
    assert "base.head.bias" in names[1]


def test_weight_decay_leaves_a_closed_generator_to_its_gradient():
    model = condmod.create("film(init='identity')", features=8, condition_dim=4)
    want = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(condmod.parameter_groups(model, weight_decay=0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), want))


def test_no_random_number_is_drawn():
    model = condmod.create("film", features=8, condition_dim=4)
    before = torch.get_rng_state()
    condmod.parameter_groups(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_on_the_meta_device_is_grouped_as_a_real_one():
    real = condmod.create("adaln_zero", features=8, condition_dim=4)
    with torch.device("meta"):
        ghost = condmod.create("adaln_zero", features=8, condition_dim=4)
    assert grouped(ghost) == grouped(real)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: condmod.parameter_groups([]), "a model is a torch.nn.Module; got []"),
        (
            lambda: condmod.parameter_groups(nn.Linear(2, 2), -0.1),
            "weight_decay is a number from 0 on, such as 0.01; got -0.1",
        ),
        (
            lambda: condmod.parameter_groups(nn.Linear(2, 2), "0.1"),
            "weight_decay is a number from 0 on, such as 0.01; got '0.1'",
        ),
        (
            lambda: condmod.parameter_groups(nn.Linear(2, 2).requires_grad_(False)),
            "no parameter of this model trains (requires_grad is False for all): there is nothing "
            "to group; unfreeze the model, or what is attached to it",
        ),
    ],
    ids=["no model", "negative", "text", "frozen"],
)
def test_bad_input_is_refused(call, told):
    with pytest.raises(SiteError) as caught:
        call()
    assert str(caught.value) == told
