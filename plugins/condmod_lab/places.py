"""The places of a network: one bank of modulators, which a spec fills."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from condmod import (
    Bank,
    Condition,
    Modulator,
    ModulatorSpec,
    Site,
    SiteError,
    SpecError,
    SublayerModulator,
    configure,
    create_bank,
)

AnyModulator: TypeAlias = Modulator[Any, Any] | SublayerModulator[Any, Any]
Place: TypeAlias = tuple[AnyModulator, Any]
"""A modulator, and the modulation that it applies in one pass."""


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


def fill(spec: ModulatorSpec, site: Site, names: Sequence[str]) -> Bank:
    """Build the modulators of all places, and what they share.

    Each place draws its parameters by its own name, and what is shared by the name "shared".

    Args:
        spec: what fills them.
        site: what they have in common, with the width of the embedding that they offer.
        names: of the places.

    Raises:
        SiteError: the modulator does not fit; says the place, the spec and the reason.
    """
    component, place = configure(spec).component, names[0]
    if not component.kinds & {"global", "raw"}:
        raise SiteError(
            f"the place {place!r} offers one embedding of time and class for a whole image (a "
            "global condition), or the signals {'time': ..., 'label': ...} themselves (a raw "
            f"condition); {spec} takes {' or '.join(sorted(component.kinds))} conditions; "
            "fill it with another modulator, such as dense_film"
        )
    if issubclass(component, SublayerModulator) and component.reads_weight:
        raise SiteError(
            f"the place {place!r} has sublayers of several layers; {spec} reads the weight of "
            "a single one; fill it with another modulator, such as adaln_zero"
        )
    if takes_signals(spec):
        site = replace(site, condition_dim=None)
    try:
        with own_draws("bank"):
            bank = create_bank(spec, dict.fromkeys(names, site))
    except SpecError as error:  # of a spec inside this one, which knows no place
        raise SiteError(f"the place {place!r} cannot be filled with {spec}: {error}") from None
    for name, module in [("shared", bank.shared), *((name, bank[name]) for name in bank)]:
        if module is not None:
            with own_draws(name):
                module.reset_parameters()
    return bank


def check_parts(bank: Bank, sublayers: str) -> None:
    """Check that modulators act around one sublayer or two, which is all that a block has.

    Args:
        bank: what fills the places.
        sublayers: a block's sublayers in words, such as "two convolutions".

    Raises:
        SiteError: they act around more.
    """
    modulator = bank[bank.names[0]]
    if isinstance(modulator, SublayerModulator) and modulator.parts > 2:
        raise SiteError(
            f"the place {modulator.site.name!r} has {sublayers}, so it takes a modulator around 1 "
            f"or 2 sublayers; {modulator.config} acts around {modulator.parts}"
        )


def generate(
    bank: Bank, x: Tensor, condition: Condition, made: Mapping[str, Any] | None = None
) -> list[Place]:
    """Every place with its modulation, all generated at once.

    Args:
        bank: what fills the places.
        x: features as the first place gets them; all places get this shape.
        condition: what every place is given.
        made: every place's modulation by name, where it is known; nothing is generated then.

    Raises:
        ShapeError: features and condition do not belong together; says the first place.
        ConditionError: the condition's content is wrong.
    """
    if made is None:
        bank[bank.names[0]].match(x, condition)
        made = bank(condition)
    return [(bank[name], made[name]) for name in bank]
