"""Baselines: what any comparison of conditionings needs as its zero."""

from collections.abc import Sequence
from typing import Any

import condmod
from condmod_baseline.add import Add
from condmod_baseline.concat_project import ConcatProject
from condmod_baseline.none import Unconditioned


@condmod.hookimpl
def condmod_modulators() -> Sequence[type[condmod.Modulator[Any, Any]]]:
    """The modulators of this family."""
    return [Unconditioned, Add, ConcatProject]
