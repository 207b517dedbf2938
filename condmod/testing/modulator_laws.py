"""The laws of a modulator; each takes a case and raises AssertionError with what is wrong.

Where a law has nothing to check it skips, and says why.
"""

from __future__ import annotations

from collections.abc import Callable

from condmod.testing.cases import ModulatorCase
from condmod.testing.modulator_meaning import (
    aligned,
    bad_shapes,
    gradients,
    identity,
    options,
    reference,
    reset,
    round_trip,
    rows,
    shape,
    table,
)
from condmod.testing.modulator_precision import gradcheck, precision
from condmod.testing.modulator_running import (
    compiled,
    copies,
    exported,
    functional_call,
    meta,
    modulation_tree,
    no_broadcast_copy,
    recompiles,
    split,
)

Law = Callable[[ModulatorCase], None]

MODULATOR_LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        shape,
        identity,
        gradients,
        reset,
        rows,
        aligned,
        table,
        round_trip,
        options,
        gradcheck,
        precision,
        compiled,
        recompiles,
        exported,
        copies,
        functional_call,
        meta,
        split,
        modulation_tree,
        reference,
        bad_shapes,
        no_broadcast_copy,
    )
}
