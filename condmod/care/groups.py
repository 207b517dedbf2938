"""Which parameters weight decay suits: groups ready for an optimizer."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from condmod.attaching.planning import check_model
from condmod.care.starts import Start, starts
from condmod.component import Component
from condmod.encoder import Encoder
from condmod.errors import SiteError
from condmod.functional import BatchNorm, Norm

Reason = Literal["start", "null", "table", "embedding", "norm", "bias"]
"""Why a parameter is not to decay."""

NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    Norm,
    BatchNorm,
)


def parameter_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: what decays, and what does not.

    Not to decay are biases, norms, embeddings, and of condmod's components also what starts at a
    constant (zero-initialised generators), learned nulls and tables. All other weights decay, those
    of the rest of the model too. Every parameter that trains is in one group, once; frozen ones
    are in none.

    Args:
        model: any model, such as what `attach` returned, or a part of one.
        weight_decay: of the first group; that of the second is 0.

    Returns:
        For `torch.optim.AdamW(groups, lr=...)` and its like: one or two mappings with `name`
        ("decay", "no_decay"), `params`, `param_names` and `weight_decay`, none of them empty.

    Raises:
        SiteError: no model, a weight decay that is no number from 0 on, or nothing that trains.
    """
    check_model(model)
    number = isinstance(weight_decay, int | float) and not isinstance(weight_decay, bool)
    if not (number and 0 <= weight_decay < float("inf")):
        raise SiteError(f"weight_decay is a number from 0 on, such as 0.01; got {weight_decay!r}")
    exempt = reasons(model, starts(model))
    groups: list[dict[str, Any]] = []
    for name, decay in (("decay", weight_decay), ("no_decay", 0.0)):
        held = [
            (key, parameter)
            for key, parameter in model.named_parameters()
            if parameter.requires_grad and (key in exempt) == (name == "no_decay")
        ]
        if held:
            groups.append(
                {
                    "name": name,
                    "params": [parameter for _, parameter in held],
                    "param_names": [key for key, _ in held],
                    "weight_decay": decay,
                }
            )
    if not groups:
        raise SiteError(
            "no parameter of this model trains (requires_grad is False for all): there is "
            "nothing to group; unfreeze the model, or what is attached to it"
        )
    return groups


def reasons(model: nn.Module, known: dict[str, Start]) -> dict[str, Reason]:
    """Why parameters of a model are not to decay, by name; those that decay are left out.

    One that has several names (tied weights) is under its first, and exempt if any says so.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Reason] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            path = first[id(parameter)]
            start = known.get(f"{prefix}.{name}" if prefix else name)
            reason = _reason(module, name, parameter, start)
            if reason is not None:
                found.setdefault(path, reason)
    return found


def _reason(
    module: nn.Module, name: str, parameter: nn.Parameter, start: Start | None
) -> Reason | None:
    reason: Reason | None = None
    if isinstance(module, Encoder) and parameter is module.null:
        reason = "null"
    elif isinstance(module, Component | Encoder) and not name.endswith(("weight", "bias")):
        reason = "table"
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        reason = "embedding"
    elif isinstance(module, NORMS):
        reason = "norm"
    elif start is not None and start.is_constant and (parameter.ndim > 1 or start.value.any()):
        reason = "start"
    elif parameter.ndim < 2 or name.endswith("bias"):
        reason = "bias"
    return reason
