"""What the pages say of components, commands, laws and fields is what the live code says."""

import importlib.util
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import typer

import condmod
from condmod.cli import app
from condmod.testing import ENCODER_LAWS, MODULATOR_LAWS
from condmod_lab.config import TrainConfig, flat, make_config
from condmod_lab.paired import FIGURES, summarise

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
    text = hooks.expand((DOCS / "training.md").read_text(encoding="utf-8"))
    sections = ({"name": "conv"}, {"name": "transformer"})
    configs = [make_config({"modulator": "none", "backbone": section}) for section in sections]
    configs.append(make_config({"modulator": "none", "data": {"name": "csv", "path": "a.csv"}}))
    fields = {key for config in configs for key in flat(config) if key != "modulator.name"}
    for field in {key for key in fields if not key.endswith(".name")} | {"modulator", "encoder"}:
        assert f"| `{field}` |" in text, f"the field {field} is not shown"


def test_a_choice_of_sections_is_shown_variant_by_variant_with_the_fields_of_each(hooks):
    rows = hooks.fields("condmod_lab.config.TrainConfig").splitlines()
    heads = [row.split("`")[1] for row in rows if row.startswith("| **`")]
    assert heads == [
        *("data.name: digits", "data.name: folder", "data.name: csv"),
        *("backbone.name: conv", "backbone.name: transformer"),
    ]
    conv, transformer = (
        next(at for at, row in enumerate(rows) if f"`backbone.name: {name}`" in row)
        for name in ("conv", "transformer")
    )
    assert "The default." in rows[conv]
    assert "The default." not in rows[transformer]
    assert conv < _row(rows, "backbone.groups") < transformer < _row(rows, "backbone.heads")
    assert sum(row.startswith("| `backbone.channels` |") for row in rows) == 2


def test_a_field_is_shown_with_its_bounds_its_choices_and_its_default_as_yaml_has_it(hooks):
    rows = hooks.fields("condmod_lab.config.TrainConfig").splitlines()
    for field, end in {
        "seed": "From 0 to 2147483648. | `0` |",
        "data.path": "The folder of the classes' folders. | required |",
        "data.color": "| `false` |",
        "training.precision": "One of `fp32`, `bf16`, `fp16`. | `fp32` |",
        "training.learning_rate": "Above 0, to 1. | `0.002` |",
        "trackers": "| `[]` |",
        "encoder": "embedding. |  |",
    }.items():
        assert rows[_row(rows, field)].endswith(end), rows[_row(rows, field)]


def _row(rows, field):
    return next(at for at, row in enumerate(rows) if row.startswith(f"| `{field}` |"))


LONG = (
    "multi_condition(encoder=fuse(inputs={'time': timestep(scale=1000.0), "
    "'label': label(classes=10, nullable=True)}))"
)


@pytest.fixture
def results(tmp_path):
    """A made-up comparison: `film` best, one that ties with it, `none` worse, one that failed."""
    specs, seeds = ["film", LONG, "none", "add"], [0, 1, 2]
    table = 0.9 + 0.01 * torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    noise = 0.02 * torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    tables = {"film": table, LONG: table - 0.001 + noise, "none": table - 0.5}
    tables["add"] = torch.full_like(table, math.nan)
    items = {
        spec: {f.name: 1 - values if f.better == "lower" else values for f in FIGURES if f.reduce}
        for spec, values in tables.items()
    }
    costs = {
        spec: {f.name: [0.5, 0.5, math.nan if spec == "add" else 0.5] for f in FIGURES}
        for spec in specs
    }
    document = {
        "specs": specs,
        "seeds": seeds,
        "command": shlex.join(["condmod", "compare", *specs, "--seeds", "3", "--jobs", "2"]),
        "config": TrainConfig().model_dump(mode="json"),
        "machine": {"torch": "2.13.0", "cpus": 2, "device": "cpu", "jobs": 2, "threads": 1},
        "failed": {"add seed 2": "the loss is nan"},
        **summarise(specs, seeds, items, costs),
        "curves": {},
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path, document


def test_a_comparison_is_shown_with_figures_ties_standings_and_caution(hooks, results):
    path, document = results
    text = hooks.expand(f"Before.\n\n<!-- comparison: {path} -->\n\nAfter.")
    assert text.startswith("Before.")
    assert text.rstrip().endswith("After.")
    for figure in document["figures"].values():
        assert f"| {figure['title']}" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows[:4]] == [
        "| `film`",
        "| `multi_condition(...)`",
        "| `none`",
        "| `add`",
    ]
    cells = [row[2] for row in rows[:4]]
    assert re.fullmatch(r"\*\*0\.\d{3}\*\*\\\*<br><small>±0\.\d{3}</small>", cells[0])
    assert re.fullmatch(r"0\.\d{3}~<br><small>±0\.\d{3}</small>", cells[1])
    assert re.fullmatch(r"0\.\d{3}<br><small>±0\.\d{3}</small>", cells[2])
    assert cells[3] == "n/a"
    assert rows[4][2].startswith("500.0<br>"), "step time is in milliseconds"
    for name, words in document["standings"].items():
        shown = words.replace(LONG, "multi_condition(...)")
        assert f"- **{document['figures'][name]['title']}**: {shown}" in text
    for words in (document["caution"], "add seed 2: the loss is nan", "2 runs side by side"):
        assert words in text
    assert "1,500 steps of 128 images each" in text
    assert "torch 2.13.0" in text


def test_the_command_of_a_comparison_is_wrapped_and_still_the_same_for_a_shell(hooks, results):
    path, document = results
    shown = re.search(r"```bash\n(.*?)\n```", hooks.comparison(str(path)), re.DOTALL)[1]
    assert shown.count("\n") == 2
    assert shlex.split(shown.replace("\\\n", "")) == shlex.split(document["command"])


def test_a_comparison_that_cannot_be_read_fails_a_strict_build_and_no_other(
    hooks, tmp_path, caplog
):
    torn = tmp_path / "torn.json"
    torn.write_text('{"specs": [')
    for path in (tmp_path / "none.json", torn):
        assert f"*{path} holds no comparison.*" in hooks.expand(f"<!-- comparison: {path} -->")
        assert (caplog.records[-1].name, caplog.records[-1].levelname) == (
            "mkdocs.hooks",
            "WARNING",
        )
        assert str(path) in caplog.text


def test_parity_is_shown_with_one_row_for_what_differs_in_nothing_shown(hooks, tmp_path):
    row = {
        "mechanism": "film",
        "peer": "some-package",
        "version": "1.2",
        "what": "FiLM",
        "shapes": "x (2, 5), c (2, 3)",
        "dtype": "float64",
        "tolerance": 1e-12,
    }
    rows = [
        row | {"difference": 0.0, "test": "test_one"},
        row | {"difference": 2.2e-16, "test": "test_two"},
        row | {"difference": 0.0, "what": "SFT", "tolerance": 0.0, "test": "test_three"},
    ]
    path = tmp_path / "parity.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    text = hooks.expand(f"<!-- parity: {path} -->", "../catalogue/")
    film, went_in = "| [`film`](../catalogue/film.md) |", "some-package 1.2; x (2, 5), c (2, 3)"
    assert text.splitlines()[2:] == [
        f"{film} FiLM<br><small>{went_in}</small> | 2.2e-16<br><small>of 1e-12, float64</small> |",
        f"{film} SFT<br><small>{went_in}</small> | 0<br><small>of 0, float64</small> |",
    ]


def test_the_page_on_parity_shows_every_mechanism_that_was_compared(hooks):
    text = hooks.expand((DOCS / "parity.md").read_text(encoding="utf-8"), "catalogue/")
    for row in json.loads((DOCS / "parity.json").read_text(encoding="utf-8")):
        page = f"catalogue/{row['mechanism']}.md"
        start = f"| [`{row['mechanism']}`]({page}) | {row['what']}<br><small>"
        assert f"{start}{row['peer']} {row['version']};" in text
        assert (DOCS / page).is_file(), f"{row['test']} names no component"


def test_passes_are_what_the_formulas_need(hooks):
    passes = {name: hooks.sample(hooks.page_spec(name)).passes for name in ("none", "add", "film")}
    assert passes == {"none": (), "add": ("add",), "film": ("addcmul",)}
    norm_affine_gate = ("native_layer_norm", "addcmul", "addcmul")
    assert hooks.sample("adaln_zero").passes == norm_affine_gate
    text = hooks.component("adaln_zero")
    assert "| **Passes over x** | 3 per part |" in text


def test_an_unknown_component_in_a_marker_is_an_error(hooks):
    with pytest.raises(condmod.UnknownNameError, match="did you mean 'film'"):
        hooks.expand("<!-- component: fillm -->")


def test_the_matrix_shows_a_tick_or_the_number_of_a_reason_in_every_cell(hooks, tmp_path):
    from condmod.testing import MODULATOR_LAWS

    kept = {"kept": 2, "skipped": {}}
    row = dict.fromkeys(MODULATOR_LAWS, kept)
    row |= {"identity": {"kept": 0, "skipped": {"it has no option init": 2}}}
    row |= {"table": {"kept": 1, "skipped": {"it takes no rows": 1}}}
    path = tmp_path / "conformance.json"
    path.write_text(json.dumps({"film": row}), encoding="utf-8")
    text = hooks.expand(f"<!-- conformance: {path} -->", "catalogue/")
    assert '<a href="../catalogue/film/"><code>film</code></a>' in text
    assert text.count("<td>✓</td>") == len(MODULATOR_LAWS) - 2
    assert text.count("<td><sup>1</sup></td>") == 1
    assert text.count("<td>✓<sup>2</sup></td>") == 1
    assert text.endswith("1. it has no option init\n2. it takes no rows")
