"""Time: encoders of a timestep or noise level, and modulators that take one as it is."""

from collections.abc import Sequence
from typing import Any

import condmod
from condmod_timestep.fourier import Fourier
from condmod_timestep.per_timestep import PerTimestep
from condmod_timestep.timestep import Timestep
from condmod_timestep.timestep_table import TimestepTable


@condmod.hookimpl
def condmod_encoders() -> Sequence[type[condmod.Encoder[Any]]]:
    """The encoders of this family."""
    return [Timestep, Fourier]


@condmod.hookimpl
def condmod_modulators() -> Sequence[type[condmod.Modulator[Any, Any]]]:
    """The modulators of this family."""
    return [PerTimestep, TimestepTable]
