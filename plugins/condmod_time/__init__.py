"""Modulations that run along time, for audio and other sequences."""

from collections.abc import Sequence
from typing import Any

import condmod
from condmod_time.conditional_tfilm import ConditionalTFilm
from condmod_time.gpocm import GPoCM
from condmod_time.tfilm import TFilm
from condmod_time.tiny_tfilm import TinyTFilm
from condmod_time.tvfilm import TVFilm
from condmod_time.wavenet_gate import WaveNetGate


@condmod.hookimpl
def condmod_modulators() -> Sequence[type[condmod.Component[Any, Any]]]:
    """The modulators of this family."""
    return [ConditionalTFilm, GPoCM, TFilm, TinyTFilm, TVFilm, WaveNetGate]
