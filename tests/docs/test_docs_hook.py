"""What the pages say of components, commands, laws and fields is what the live code says."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import typer

import condmod
from condmod.cli import app
from condmod.testing import ENCODER_LAWS, MODULATOR_LAWS

DOCS = Path(__file__).parents[2] / "docs"
NAMES = [*condmod.list_modulators(), *condmod.list_encoders()]
SHIPPED = [n for n in NAMES if condmod.Registry().entry(n).distribution == "condmod"]
GROUP = typer.main.get_command(app)
COMMANDS = GROUP.list_commands(None)


@pytest.fixture(scope="module")
def hooks():
    found = importlib.util.spec_from_file_location("condmod_docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    yield module
    del sys.modules[found.name]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_component_has_a_page_that_shows_all_of_it(hooks, name):
    page = DOCS / "catalogue" / f"{name}.md"
    assert page.is_file(), f"write {page}; CONTRIBUTING.md shows how"
    spec = condmod.parse(hooks.page_spec(name))
    assert spec.name == name
    text = hooks.expand(page.read_text(encoding="utf-8"))
    known = condmod.describe(name)
    assert known.summary in text
    for option in known.options:
        assert f"| `{option.name}` |" in text, f"the option {option.name!r} is not shown"
        assert option.description.replace("|", "\\|") in text
    for kind in known.kinds:
        assert f"`{kind}`" in text
    for section in ("Shapes", "At the start", "Source"):
        assert re.search(rf"^## {section}\n\n\S", text, re.MULTILINE), f"{section} is missing"
    assert f"{hooks.sample(hooks.page_spec(name)).parameters:,}" in text
    assert "```python\n    " in text, "the file is not shown"


def test_the_overviews_list_every_component(hooks):
    for page in ("index.md", "catalogue/index.md"):
        text = hooks.expand((DOCS / page).read_text(encoding="utf-8"), "catalogue/")
        for name in SHIPPED:
            assert f"[`{name}`](catalogue/{name}.md)" in text, f"{page} lacks {name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(hooks, name):
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert f"<!-- command: {name} -->" in page, f"add a section for `condmod {name}` to docs/cli.md"
    text, found = hooks.command(name), GROUP.get_command(None, name)
    assert f"\ncondmod {name}" in text, "there is no example"
    for parameter in found.params:
        assert (parameter.help or "").replace("|", "\\|") in text
        if parameter.param_type_name == "option":
            assert f"| `{parameter.opts[0]}" in text
    assert all(parameter.help for parameter in found.params), "a parameter has no help"


def test_every_law_is_documented(hooks):
    text = hooks.expand((DOCS / "contract.md").read_text(encoding="utf-8"))
    for law in (*MODULATOR_LAWS, *ENCODER_LAWS):
        assert f"| `{law}` |" in text, f"the law {law} is not in docs/contract.md"


def test_every_field_of_a_run_is_documented(hooks):
    text = hooks.expand((DOCS / "the-demo.md").read_text(encoding="utf-8"))
    for field in ("modulator", "encoder", "backbone.channels", "training.steps", "sampling.steps"):
        assert f"| `{field}` |" in text


def test_passes_are_what_the_formulas_need(hooks):
    passes = {name: hooks.sample(hooks.page_spec(name)).passes for name in ("none", "add", "film")}
    assert passes == {"none": 0, "add": 1, "film": 1}
    assert hooks.sample("adaln_zero").passes == 3  # norm, affine, gate


def test_an_unknown_component_in_a_marker_is_an_error(hooks):
    with pytest.raises(condmod.UnknownNameError, match="did you mean 'film'"):
        hooks.expand("<!-- component: fillm -->")
