"""Filling a place of a network from a spec."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from condmod import (
    Modulator,
    ModulatorSpec,
    Site,
    SiteError,
    SpecError,
    SublayerModulator,
    configure,
    create,
)

AnyModulator: TypeAlias = Modulator[Any, Any] | SublayerModulator[Any, Any]


def takes_signals(spec: ModulatorSpec) -> bool:
    """Whether a modulator encodes time and class itself, and so has no use for their embedding."""
    kinds = configure(spec).component.kinds
    return "raw" in kinds and "global" not in kinds


@contextmanager
def own_draws(name: str) -> Iterator[None]:
    """Draw by the seed and a name alone, and leave the stream of random numbers as it was.

    So the parameters that two networks have in common start equal under equal seeds, whatever
    fills their places.
    """
    with torch.random.fork_rng(devices=[]):
        seed = zlib.crc32(f"{torch.initial_seed()} {name}".encode())
        # torch.manual_seed would reseed GPUs too, whose streams are not put back
        torch.default_generator.manual_seed(seed)
        yield


def fill(spec: ModulatorSpec, site: Site) -> AnyModulator:
    """Build the modulator of one place.

    Args:
        spec: what fills it.
        site: the place, with the width of the embedding that it offers.

    Raises:
        SiteError: the modulator does not fit; says the place, the spec and the reason.
    """
    component = configure(spec).component
    if not component.kinds & {"global", "raw"}:
        raise SiteError(
            f"the place {site.name!r} offers one embedding of time and class for a whole image (a "
            "global condition), or the signals {'time': ..., 'label': ...} themselves (a raw "
            f"condition); {spec} takes {' or '.join(sorted(component.kinds))} conditions; "
            "fill it with another modulator, such as dense_film"
        )
    if issubclass(component, SublayerModulator) and component.reads_weight:
        raise SiteError(
            f"the place {site.name!r} has sublayers of several layers; {spec} reads the weight of "
            "a single one; fill it with another modulator, such as adaln_zero"
        )
    if takes_signals(spec):
        site = replace(site, condition_dim=None)
    try:
        with own_draws(site.name):
            return create(spec, site)
    except SpecError as error:  # of a spec inside this one, which knows no place
        raise SiteError(f"the place {site.name!r} cannot be filled with {spec}: {error}") from None


def check_parts(modulator: AnyModulator, sublayers: str) -> None:
    """Check that a modulator acts around one sublayer or two, which is all that a block has.

    Args:
        modulator: what fills the place.
        sublayers: the block's sublayers in words, such as "two convolutions".

    Raises:
        SiteError: it acts around more.
    """
    if isinstance(modulator, SublayerModulator) and modulator.parts > 2:
        raise SiteError(
            f"the place {modulator.site.name!r} has {sublayers}, so it takes a modulator around 1 "
            f"or 2 sublayers; {modulator.config} acts around {modulator.parts}"
        )
