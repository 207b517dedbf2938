"""docs/attaching-matrix.json says what these tests say, and the site shows all of it."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def hooks():
    found = importlib.util.spec_from_file_location("condmod_matrix_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    yield module
    del sys.modules[found.name]


def test_every_row_is_made_by_a_test_that_exists(matrix, collected):
    gone = sorted({row["test"] for row in matrix} - set(collected))
    assert not gone, f"docs/attaching-matrix.json has rows of {gone}: run `make matrix`"


def test_every_cell_is_there_once(matrix):
    cells = [(row["group"], row["what"]) for row in matrix]
    assert len(cells) == len(set(cells))


def test_what_does_not_work_has_its_reason_and_what_works_needs_none(matrix):
    assert {row["verdict"] for row in matrix} <= {"works", "refused", "not measured"}
    for row in matrix:
        assert bool(row["reason"]) == (row["verdict"] != "works"), row


def test_the_page_shows_every_cell(matrix, hooks):
    page = (DOCS / "matrix.md").read_text(encoding="utf-8")
    shown = re.findall(r"^<!-- matrix: (.+) -->$", page, re.MULTILINE)
    assert sorted(shown) == sorted({row["group"] for row in matrix})
    text = hooks.expand(page)
    for row in matrix:
        reason = f"<br><small>{row['reason']}</small>" if row["reason"] else ""
        assert f"| {row['verdict']} | {row['what']}{reason} |" in text


def test_a_group_that_is_not_there_fails_a_strict_build(hooks, caplog):
    hooks.expand("<!-- matrix: nothing -->")
    assert caplog.records[-1].name == "mkdocs.hooks"
    assert caplog.messages == [
        "docs/attaching-matrix.json has no group 'nothing': run `make matrix`"
    ]
