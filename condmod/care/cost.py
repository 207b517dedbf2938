"""What a component costs at a place: its parameters, and its passes over the features."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from condmod.attaching.planned import count
from condmod.bank import Bank
from condmod.build import SpecLike, configure, create_encoder
from condmod.config import ModulatorConfig
from condmod.errors import CondmodError
from condmod.modulator import Modulator
from condmod.probe import condition_for
from condmod.site import Site

_BATCH = 2
_PLACES: tuple[tuple[int, tuple[int, ...]], ...] = (  # channels at, and positions
    (-1, (4096,)),
    (-1, (64, 64)),
    (1, (64, 64)),
    (1, (4096,)),
    (1, (16, 16, 16)),
)


class Cost(NamedTuple):
    """What a component costs at one place.

    Attributes:
        parameters: at each site; of an encoder all of them.
        shared: once for all sites of a bank.
        passes: the operators that read or write something as large as the features, in eager
            mode, for one part and without those of a sublayer; None where they cannot be counted.
    """

    parameters: int
    shared: int
    passes: tuple[str, ...] | None


def cost(spec: SpecLike, *, features: int, condition_dim: int) -> Cost:
    """Count parameters and, in one small run, passes.

    Args:
        spec: of a modulator or an encoder, whose output is then `condition_dim` wide.
        features: C.
        condition_dim: D; not used by what owns its encoder or reads the features alone.

    Raises:
        SiteError: the component does not fit such a place.
    """
    config = configure(spec)
    with torch.device("meta"):
        if not isinstance(config, ModulatorConfig):
            return Cost(count(create_encoder(config, condition_dim)), 0, None)
        width = None if config.component.kinds & {"raw", "self"} else condition_dim
        bank = Bank(config, {"here": Site(features, width)})
    shared = 0 if bank.shared is None else count(bank.shared)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return Cost(count(bank["here"]), shared, _passes(config, features, width))


def _passes(config: ModulatorConfig, features: int, width: int | None) -> tuple[str, ...] | None:
    """The passes for features with channels last or, where that does not work, first."""
    for dim, sides in _PLACES:
        shape = (_BATCH, features, *sides) if dim == 1 else (_BATCH, *sides, features)
        x = torch.zeros(shape)
        try:
            bank = Bank(config, {"here": Site(features, width, dim)})
            own = bank["here"]
            probe: Any = own
            while hasattr(probe, "inner"):  # one that owns its encoder
                probe = probe.inner
            condition = condition_for(probe, x, torch.zeros)
            made = bank(condition)["here"] if probe is own else probe.generate(condition)
            noted = _Noted(x.numel())
            with torch.no_grad():
                if isinstance(probe, Modulator):
                    with noted:
                        probe.modulate(x, made)
                else:
                    layer = _layer(features, dim) if probe.reads_weight else None
                    with noted:
                        entered = probe.enter(x, made[0], layer)
                    y = entered if layer is None else layer(entered)
                    with noted:
                        probe.exit(x, y, made[0], layer)
        except (CondmodError, RuntimeError, NotImplementedError, TypeError):
            continue  # another rank, or the other end
        return tuple(noted.found)
    return None


def _layer(features: int, channel_dim: int) -> torch.nn.Module:
    if channel_dim == -1:
        return torch.nn.Linear(features, features)
    return torch.nn.Conv2d(features, features, 1)


class _Noted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators that read or write as many elements as the features have."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = size
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
        large = any(isinstance(leaf, Tensor) and leaf.numel() >= self.size for leaf in leaves)
        if large and not func.is_view and func._opname != "_unsafe_view":
            self.found.append(func._opname)
        return out
