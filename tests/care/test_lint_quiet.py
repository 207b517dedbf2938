"""Lint raises no false alarm: shipped components, networks and attached models have no findings."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import condmod
from condmod.errors import SpecError
from condmod.testing import ModulatorCase
from condmod_lab.config import make_config
from condmod_lab.network import build

LAWS = Path(__file__).parents[1] / "laws"
sys.path.insert(0, str(LAWS))
CASES = [
    case
    for table in sorted(path.stem for path in LAWS.glob("cases_*.py"))
    for case in importlib.import_module(table).CASES
]
SPECS = (
    *("film", "film(init='identity')", "adaln", "adaln_zero", "adaln_zero(parts=1)"),
    *("adaln_zero(init='identity')", "adaln_single", "cnaps", "mmdit", "lumina", "none", "cosmos"),
    *("film_block", "ada_group_norm(groups=4)", "adaptive_layer_scale", "af3_adaln"),
    "multi_condition(encoder=fuse(inputs={'time': timestep(scale=1000.0), "
    "'label': label(classes=10, nullable=True)}))",
)


def findings(model):
    """Everything that lint says of a model that is trained as it should be, from its start."""
    said = list(condmod.lint(model, fresh=True))
    if any(parameter.requires_grad for parameter in model.parameters()):
        optimizer = torch.optim.AdamW(condmod.parameter_groups(model), lr=1e-3)
        said += condmod.lint(model, optimizer, fresh=True)
    return said


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_shipped_component_has_no_findings_as_it_was_published(case):
    assert findings(case.build()) == []


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if "init" in type(case.config).model_fields],
    ids=lambda case: case.name,
)
def test_a_shipped_component_has_no_findings_at_the_identity(case):
    assert isinstance(case, ModulatorCase)
    said = {name: getattr(case.config, name) for name in case.config.model_fields_set}
    try:
        spec = type(case.config).from_options({**said, "init": "identity"})
    except SpecError:
        pytest.skip("it cannot start as the identity")
    assert findings(case.build(spec=spec)) == []


@pytest.mark.parametrize("backbone", ["conv", "transformer"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_labs_networks_have_no_findings(spec, backbone):
    sizes = {"channels": 16, "blocks": 2, "condition_dim": 16}
    fields = {"output": "run", "backbone": {"name": backbone, **sizes}, "modulator": spec}
    assert findings(build(make_config(fields, []), 10, (1, 8, 8)).train()) == []


class Model(nn.Module):
    """Pre-norm blocks beside a convolution with a batch norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        h = self.stem(x).movedim(1, -1)
        return h + self.mlp(self.norm(h))


@pytest.mark.parametrize("freeze", ["base", "none"])
@pytest.mark.parametrize(
    "patterns",
    [
        {"stem.0": "film", "stem.1": "film"},
        {"stem.0": "cnaps", "norm": "dense_film", "mlp": "adaln_zero"},
        {"mlp.0": ("film", "input"), "mlp.2": ("film", "input"), "norm": ("add", "input")},
    ],
    ids=["stem", "three", "inputs"],
)
def test_attached_models_have_no_findings(patterns, freeze):
    site = condmod.attach(Model(), patterns, condition_dim=8, freeze=freeze)
    assert findings(site) == []


def test_an_attached_model_with_an_encoder_has_no_findings():
    encoder = "fuse(inputs={'a': label(classes=3, nullable=True), 'b': timestep}, drop=0.1)"
    site = condmod.attach(Model(), {"norm": "film"}, encoder=encoder)
    assert findings(site) == []
    assert condmod.lint(nn.ModuleDict({"model": site})) == []


def test_what_is_trained_has_no_findings():
    site = condmod.attach(Model(), {"norm": "film", "mlp": "adaln_zero"}, condition_dim=4)
    optimizer = torch.optim.AdamW(condmod.parameter_groups(site), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        site(torch.randn(2, 8, 5), condition=torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        assert condmod.lint(site, optimizer) == []
