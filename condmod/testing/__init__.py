"""The laws of the contract as pytest checks, for the author of a plugin; ours pass the same.

```python
import pytest
from condmod import Site
from condmod.testing import ModulatorCase, conformance

CASES = [ModulatorCase("acme.gate", Site(6, 4), reference=naive_gate)]

@conformance(CASES)
def test_laws(law, case):
    law(case)
```

The laws run on torch's default device: `with torch.device("cuda"): law(case)`.
"""

from collections.abc import Iterable
from typing import Any

import pytest

from condmod.testing.cases import EncoderCase, ModulatorCase
from condmod.testing.encoder_laws import ENCODER_LAWS
from condmod.testing.modulator_laws import MODULATOR_LAWS

__all__ = ["ENCODER_LAWS", "MODULATOR_LAWS", "EncoderCase", "ModulatorCase", "conformance"]


def conformance(cases: Iterable[ModulatorCase | EncoderCase]) -> pytest.MarkDecorator:
    """Parametrise a test with every law times every case.

    A law that a component waives (its class's `waivers`, law to reason) is skipped with that
    reason; a waiver of a law that does not exist is an error.

    Raises:
        ValueError: a component waives an unknown law.
    """
    rows: list[Any] = []
    for case in cases:
        laws = MODULATOR_LAWS if isinstance(case, ModulatorCase) else ENCODER_LAWS
        waivers = case.component.waivers
        if unknown := set(waivers) - set(laws):
            raise ValueError(f"{case.name} waives unknown laws: {sorted(unknown)}")
        for name, law in laws.items():
            marks = [pytest.mark.skip(reason=waivers[name])] if name in waivers else []
            rows.append(pytest.param(law, case, id=f"{case.name}-{name}", marks=marks))
    return pytest.mark.parametrize(("law", "case"), rows)
