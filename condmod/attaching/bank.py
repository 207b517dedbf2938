"""Every modulator of an attachment, and its encoder: what trains and what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from condmod.attaching.planning import Plan, build_bank
from condmod.build import create_encoder
from condmod.errors import ConditionError, SiteError
from condmod.site import Condition, Signal

_POSITIONS = 3  # how many positions the check of a start has along each axis


class AttachedBank(nn.Module):
    """The modulators of every site, and the encoder if there is one.

    Args:
        plan: what goes where.
    """

    groups: Any

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.encoder = (
            None if plan.encoder is None else create_encoder(plan.encoder, plan.condition_dim)
        )
        self.groups = nn.ModuleList(build_bank(sites) for sites in plan.groups().values())

    def forward(self, condition: Any) -> dict[str, Any]:
        """The modulation of every site, by name, of a condition or of the encoder's signals."""
        made: dict[str, Any] = {}
        encoded: Condition = condition if self.encoder is None else self.encoder(condition)
        for group in self.groups:
            made.update(group(_seated(encoded, group) if self.encoder is not None else encoded))
        return made

    def modulators(self) -> dict[str, Any]:
        """Every modulator, by the name of its site."""
        return {name: group[name] for group in self.groups for name in group}

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        for module in (self.encoder, *self.groups):
            if module is not None:
                module.reset_parameters()

    def check_condition(self, condition: Any) -> None:
        """Check that a condition's tensors are where the bank is.

        Raises:
            ConditionError: on another device, or a floating condition of another dtype that no
                encoder and no autocast takes.
        """
        own = next(self.parameters(), None)
        if own is None:
            return
        for tensor in _tensors(condition):
            if tensor.device != own.device:
                raise ConditionError(
                    f"the condition is on {tensor.device}, the attached modulators are on "
                    f"{own.device}; move one of them"
                )
            plain = self.encoder is None and not torch.is_autocast_enabled(own.device.type)
            plain = plain and type(own) is nn.Parameter  # FSDP2 may gather another dtype
            if plain and tensor.is_floating_point() and tensor.dtype != own.dtype:
                raise ConditionError(
                    f"the condition is {tensor.dtype}, the attached modulators are {own.dtype}; "
                    "convert one of them, or use autocast"
                )

    def check_start(self) -> None:
        """Check that every modulator starts as what it is attached to, bit for bit.

        Raises:
            SiteError: which does not.
        """
        with torch.no_grad():
            for group in self.groups:
                shared = {} if group.shared is None else group(_probe(group[group.names[0]]))
                for name in group:
                    modulator = _innermost(group[name])
                    try:
                        made = shared[name] if shared else modulator.generate(_probe(modulator))
                    except ConditionError as error:
                        raise SiteError(
                            f"{modulator.config} at {name!r} cannot be checked to start as the "
                            f"base: {error}; ask for start='published'"
                        ) from None
                    if not _leaves_alone(modulator, made):
                        raise SiteError(
                            f"{modulator.config} at {name!r} cannot start as the base: it changes "
                            "features from the start (a norm, a second residual, or a start that "
                            "is not the identity); choose one that leaves them, such as film or "
                            "dense_film, or ask for start='published'"
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


def _seated(encoded: Any, group: Any) -> Any:
    """An encoder's output (B, T, D) for sites whose features are channels first: (B, D, T)."""
    value = encoded.value if isinstance(encoded, Signal) else encoded
    firsts = {group[name].site.channel_dim == 1 for name in group}
    if value.ndim < 3 or firsts == {False}:
        return encoded
    moved = value.movedim(-1, 1)
    return encoded._replace(value=moved) if isinstance(encoded, Signal) else moved


def _tensors(condition: Any) -> list[Tensor]:
    """The tensors of a condition, of a Signal, or of a mapping of them."""
    if isinstance(condition, Tensor):
        return [condition]
    if isinstance(condition, Mapping):
        return [tensor for part in condition.values() for tensor in _tensors(part)]
    if isinstance(condition, Signal):
        return [*_tensors(condition.value), *(t for t in condition[1:] if isinstance(t, Tensor))]
    return []
