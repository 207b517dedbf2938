"""The FiLM family: features scaled and shifted by a condition, channel by channel."""

from collections.abc import Sequence
from typing import Any

import condmod
from condmod_film.audio_film import AudioFilm
from condmod_film.cft import Cft
from condmod_film.cnaps import Cnaps
from condmod_film.codecs import CODECS
from condmod_film.dense_film import DenseFilm
from condmod_film.diffusion_policy_film import DiffusionPolicyFilm
from condmod_film.film import Film
from condmod_film.film_block import FilmBlock
from condmod_film.gnn_film import GnnFilm
from condmod_film.rt1_film import Rt1Film
from condmod_film.t5_film import T5Film


@condmod.hookimpl
def condmod_modulators() -> Sequence[type[condmod.Component[Any, Any]]]:
    """The modulators of this family."""
    return [
        Film,
        DenseFilm,
        FilmBlock,
        Rt1Film,
        DiffusionPolicyFilm,
        T5Film,
        AudioFilm,
        Cnaps,
        Cft,
        GnnFilm,
    ]


@condmod.hookimpl
def condmod_codecs() -> Sequence[condmod.Codec]:
    """The published layouts of this family."""
    return CODECS
