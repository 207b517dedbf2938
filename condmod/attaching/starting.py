"""Whether a modulator starts as what it is attached to, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from condmod.bank import Bank
from condmod.config import ModulatorConfig
from condmod.errors import ConditionError, ShapeError, SiteError
from condmod.probe import condition_for
from condmod.site import Site

_SIDES = {1: ((3, 3), (3,), (3, 3, 3)), -1: ((3,), (3, 3))}  # positions to try, by channel_dim


def check_starts(places: Iterable[tuple[ModulatorConfig, Site]]) -> None:
    """Check that every modulator leaves features as they are when it starts.

    Of equal ones the first is built and tried; no random number of the caller's is drawn.

    Raises:
        SiteError: which does not.
    """
    seen = set()
    with torch.random.fork_rng(), torch.no_grad():
        for config, site in places:
            kind = (str(config), site.features, site.out_features, site.channel_dim)
            if kind not in seen:
                seen.add(kind)
                _check_start(config, site)


def _check_start(config: ModulatorConfig, site: Site) -> None:
    bank = Bank(config, {site.name: site})
    modulator = _innermost(bank[site.name])
    refusal: ConditionError | ShapeError | None = None
    for sides in _SIDES[site.channel_dim]:
        try:
            left = _leaves_alone(bank, modulator, _features(modulator, sides))
        except (ConditionError, ShapeError) as error:
            refusal = refusal or error
            continue
        if left:
            return
        raise SiteError(
            f"{config} at {site.name!r} cannot start as the base: it changes features from the "
            "start (a norm, a second residual, or a start that is not the identity); choose one "
            "that leaves them, such as film or dense_film, or ask for start='published'"
        )
    raise SiteError(
        f"{config} at {site.name!r} cannot be checked to start as the base: {refusal}; ask for "
        "start='published'"
    ) from None


def _leaves_alone(bank: Bank, modulator: Any, x: Tensor) -> bool:
    condition = condition_for(modulator, x, lambda shape: _ramp(modulator, shape))
    if bank.shared is None:
        modulation = modulator.generate(condition)
    else:
        modulation = bank(condition)[modulator.site.name]
    if hasattr(modulator, "modulate"):
        return torch.equal(modulator.modulate(x, modulation), x)
    sublayer = _sublayer(modulator, x.ndim - 2).to(x)
    return torch.equal(modulator.around(x, modulation, sublayer), sublayer(x))


def _sublayer(modulator: Any, sides: int) -> nn.Module:
    """A layer of the site's widths, which acts at each position."""
    site = modulator.site
    widths = site.features, site.out_features or site.features
    if site.channel_dim == -1:
        return nn.Linear(*widths)
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[sides - 1](*widths, 1)


def _features(modulator: Any, sides: tuple[int, ...]) -> Tensor:
    """Features with these positions, the width where the site has its channels."""
    width = modulator.site.features
    first = modulator.site.channel_dim == 1
    return _ramp(modulator, (2, width, *sides) if first else (2, *sides, width))


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
