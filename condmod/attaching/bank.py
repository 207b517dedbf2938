"""Every modulator of an attachment, and its encoder: what trains and what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from condmod.attaching.planned import Plan, build_bank
from condmod.build import create_encoder
from condmod.errors import ConditionError
from condmod.site import Condition, Signal


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
            ends = {group[name].site.channel_dim for name in group}
            kinds = group.config.component.kinds
            if "self" in kinds:
                made.update(group(None))
            elif self.encoder is None or "set" in kinds:
                made.update(group(encoded))
            elif len(ends) == 1 or group.shared is not None:
                made.update(group(_seated(encoded, *ends)))
            else:
                for name in group:
                    own = group[name]
                    made[name] = own.generate(_seated(encoded, own.site.channel_dim))
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


def _seated(encoded: Any, *ends: int) -> Any:
    """An encoder's output (B, T, D) for sites whose features are channels first: (B, D, T)."""
    value = encoded.value if isinstance(encoded, Signal) else encoded
    if value.ndim < 3 or ends != (1,):
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
