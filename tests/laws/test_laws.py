"""Every shipped component keeps every law."""

import sys
from pathlib import Path

import condmod
from condmod.testing import conformance

sys.path.insert(0, str(Path(__file__).parent))
import cases_affine
import cases_fusion
import cases_timestep

CASES = [*cases_affine.CASES, *cases_timestep.CASES, *cases_fusion.CASES]


@conformance(CASES)
def test_a_shipped_component_keeps_the_law(law, case):
    law(case)


def test_the_table_has_every_shipped_component():
    shipped = {*condmod.list_modulators(), *condmod.list_encoders()}
    assert {case.component.name for case in CASES} == shipped
