"""Whether a modulator starts as what it is attached to, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from condmod.bank import Bank
from condmod.config import ModulatorConfig
from condmod.errors import ConditionError, SiteError
from condmod.site import Site

_POSITIONS = 3  # how many positions the features of a check have along each axis


def check_starts(places: Iterable[tuple[ModulatorConfig, Site]]) -> None:
    """Check that every modulator leaves features as they are when it starts.

    Of equal ones the first is built and tried; no random number of the caller's is drawn.

    Raises:
        SiteError: which does not.
    """
    seen = set()
    with torch.random.fork_rng(), torch.no_grad():
        for config, site in places:
            kind = (str(config), site.features, site.channel_dim)
            if kind not in seen:
                seen.add(kind)
                _check_start(config, site)


def _check_start(config: ModulatorConfig, site: Site) -> None:
    bank = Bank(config, {site.name: site})
    modulator = _innermost(bank[site.name])
    try:
        if bank.shared is None:
            made = modulator.generate(_probe(modulator))
        else:
            made = bank(_probe(modulator))[site.name]
    except ConditionError as error:
        raise SiteError(
            f"{config} at {site.name!r} cannot be checked to start as the base: {error}; ask for "
            "start='published'"
        ) from None
    if not _leaves_alone(modulator, made):
        raise SiteError(
            f"{config} at {site.name!r} cannot start as the base: it changes features from the "
            "start (a norm, a second residual, or a start that is not the identity); choose one "
            "that leaves them, such as film or dense_film, or ask for start='published'"
        )


def _leaves_alone(modulator: Any, modulation: Any) -> bool:
    x = _ramp(modulator, _positioned(modulator, modulator.site.features))
    if hasattr(modulator, "modulate"):
        return torch.equal(modulator.modulate(x, modulation), x)
    return torch.equal(modulator.around(x, modulation, torch.sin), x.sin())


def _probe(modulator: Any) -> Tensor:
    """A condition for a check of the start; class or step 0 where an integer is taken."""
    if modulator.site.condition_dim is None:
        own = next(modulator.parameters(), torch.empty(0))
        return torch.zeros(2, dtype=torch.long, device=own.device)
    if "global" in modulator.kinds:
        return _ramp(modulator, (2, modulator.site.condition_dim))
    return _ramp(modulator, _positioned(modulator, modulator.site.condition_dim))


def _positioned(modulator: Any, width: int) -> tuple[int, ...]:
    """A shape with a few positions, the width where the site has its channels."""
    if modulator.site.channel_dim == 1:
        return (2, width, _POSITIONS, _POSITIONS)
    return (2, _POSITIONS, width)


def _ramp(modulator: Any, shape: tuple[int, ...]) -> Tensor:
    """Values of both signs, without drawing any, where the modulator is."""
    own = next(modulator.parameters(), torch.empty(0))
    count = torch.Size(shape).numel()
    ramp = torch.linspace(-2, 3, count, device=own.device, dtype=torch.float32)
    return ramp.to(own.dtype).reshape(shape)


def _innermost(modulator: Any) -> Any:
    """The modulator itself, or what one that owns an encoder holds."""
    while hasattr(modulator, "inner"):
        modulator = modulator.inner
    return modulator
