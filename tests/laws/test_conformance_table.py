"""The committed conformance table has every cell, and says of each case what holds today."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

_FOUND = importlib.util.spec_from_file_location(
    "condmod_law_tables", Path(__file__).with_name("test_laws.py")
)
tables = importlib.util.module_from_spec(_FOUND)
sys.modules[_FOUND.name] = tables
_FOUND.loader.exec_module(tables)

from condmod.testing import ENCODER_LAWS, MODULATOR_LAWS, ModulatorCase  # noqa: E402


def laws_of(case):
    return MODULATOR_LAWS if isinstance(case, ModulatorCase) else ENCODER_LAWS


def test_every_cell_is_filled(conformance_table):
    cells = {(name, law) for name, row in conformance_table.items() for law in row}
    assert cells == {(case.component.name, law) for case in tables.CASES for law in laws_of(case)}


def test_every_case_is_counted_once_in_every_cell(conformance_table):
    cases = Counter(case.component.name for case in tables.CASES)
    for name, row in conformance_table.items():
        for law, cell in row.items():
            counted = cell["kept"] + sum(cell["skipped"].values())
            assert counted == cases[name], f"{name}, {law}: {counted} of {cases[name]} cases"


def test_a_waived_law_stands_there_with_its_reason(conformance_table):
    for case in tables.CASES:
        for law, reason in case.component.waivers.items():
            assert reason in conformance_table[case.component.name][law]["skipped"]
