"""The FiLM family: features scaled and shifted by a condition, channel by channel."""

from collections.abc import Sequence
from typing import Any

import condmod
from condmod_film.dense_film import DenseFilm
from condmod_film.film import Film


@condmod.hookimpl
def condmod_modulators() -> Sequence[type[condmod.Modulator[Any, Any]]]:
    """The modulators of this family."""
    return [Film, DenseFilm]
