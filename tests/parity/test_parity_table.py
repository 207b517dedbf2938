"""docs/parity.json says what the parity tests say."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_row_is_made_by_a_test_that_exists(table, collected):
    gone = sorted({row["test"] for row in table} - set(collected))
    assert not gone, f"docs/parity.json has rows of {gone}: run `make parity`"


def test_every_row_names_the_version_that_constraints_pin(table):
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = dict(line.split("==") for line in text.split())
    pinned = {re.sub(r"[-_.]+", "-", name.lower()): version for name, version in pinned.items()}
    wrong = {(row["peer"], row["version"]) for row in table}
    assert not wrong - set(pinned.items()), "constraints.txt pins others: run `make parity`"


def test_every_difference_is_within_its_tolerance(table):
    assert all(row["difference"] <= row["tolerance"] for row in table)
