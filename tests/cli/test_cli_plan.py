"""`condmod plan`: what attach would put where in a model that the user names."""

import json
import sys

import pytest
from typer.testing import CliRunner

from condmod.cli import app

MINE = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8))

built = build()

def three():
    return 3

def fails():
    raise RuntimeError("no weights")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("mine", None)


def plan(*args):
    return CliRunner().invoke(app, ["plan", *args])


def test_it_prints_the_table(folder):
    done = plan(
        "mine:build", "--at", "0=film", "--at", "2=dense_film@input", "--condition-dim", "4"
    )
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "site  module  spec                         placement  features  channels  parameters",
        "0     Linear  film(init='identity')        output            8  last              80",
        "2     Linear  dense_film(init='identity')  input             8  last              80",
        "2 sites, condition_dim 4, 160 parameters (1.5 times the model's)",
    ]


def test_a_model_may_be_given_itself(folder):
    done = plan("mine:built", "--at", "0=film", "--condition-dim", "4")
    assert (done.exit_code, len(done.stdout.splitlines())) == (0, 3)


def test_it_prints_json(folder):
    done = plan(
        "mine:build", "--at", "0=film", "--encoder", "label(classes=3)", "--condition-dim",
        "4", "--start", "published", "--json",
    )  # fmt: skip
    shown = json.loads(done.stdout)
    assert shown["encoder"] == "label(classes=3)"
    assert [site["spec"] for site in shown["sites"]] == ["film"]


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (
            ["mine:build", "--at", "0=film"],
            "film(init='identity') needs the width of its",
        ),
        (
            ["mine", "--at", "0=film"],
            "the model is given as MODULE:CALLABLE, as in",
        ),
        (["mine:three", "--at", "0=film"], "mine:three gave no model: int is no torch.nn.Module"),
        (["mine:fails", "--at", "0=film"], "mine:fails gave no model: RuntimeError: no weights"),
        (
            ["mine:none", "--at", "0=film"],
            "mine:none gave no model: AttributeError: module",
        ),
        (["nowhere:it", "--at", "0=film"], "nowhere:it gave no model: ModuleNotFoundError: No mod"),
        (["mine:build", "--at", "film"], "--at takes PATTERN=SPEC, as in 'blocks.*.norm1=film'; g"),
        (
            ["mine:build", "--at", "0=film@inpt"],
            "a placement is input, output, around or weight; got 'inpt'; did you mean 'input'?",
        ),
        (["mine:build", "--at", "0=flim"], "no component is called 'flim'; did you mean"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_1(folder, args, error):
    done = plan(*args)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {error}"), done.stderr
