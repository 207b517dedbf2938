"""What publications add to the loss for their modulators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from condmod.attaching.planning import check_model
from condmod.component import Component


def penalty(model: nn.Module) -> Tensor:
    """Sum what the publications of a model's modulators regularise, for the loss.

    That is the sum of `penalty()` over all modulators that have such a method. `cnaps` has: the
    sum of squares of its ρ, which its source adds to the loss times 0.001.

    Args:
        model: any model; each modulator counts once.

    Returns:
        A tensor without dims, with a gradient; 0 where no modulator has a penalty, so that a
        training loop may add it whatever the spec.

    Raises:
        SiteError: no model.
    """
    check_model(model)
    components: list[Any] = [m for m in model.modules() if isinstance(m, Component)]
    terms: list[Tensor] = [one.penalty() for one in components if hasattr(one, "penalty")]
    if not terms:
        own = next(model.parameters(), None)
        return torch.zeros((), device=None if own is None else own.device)
    return sum((term.to(terms[0].device) for term in terms[1:]), terms[0])
