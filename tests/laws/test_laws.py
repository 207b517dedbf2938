"""Every shipped component keeps every law."""

import importlib
import sys
from pathlib import Path

import condmod
from condmod.testing import conformance

sys.path.insert(0, str(Path(__file__).parent))

TABLES = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))
CASES = [case for table in TABLES for case in importlib.import_module(table).CASES]


@conformance(CASES)
def test_a_shipped_component_keeps_the_law(law, case):
    law(case)


def test_the_table_has_every_shipped_component():
    shipped = {*condmod.list_modulators(), *condmod.list_encoders()}
    classes = {case.component for case in CASES}
    assert {name for cls in classes for name in (cls.name, *cls.aliases)} == shipped
