"""Every shipped component keeps every law."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from modulators import CASES as MODULATORS

from condmod.testing import conformance


@conformance(MODULATORS)
def test_modulators_keep_the_laws(law, case):
    law(case)
