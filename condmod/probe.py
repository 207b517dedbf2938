"""A made-up condition, to try a modulator with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def condition_for(modulator: Any, x: Tensor, draw: Callable[[tuple[int, ...]], Tensor]) -> Any:
    """A condition of a kind that a modulator takes for features, one per sample where it can be.

    Args:
        modulator: any; of what owns an encoder for integers, class or step 0.
        x: features.
        draw: gives a tensor of a shape.
    """
    kinds, width, batch = modulator.kinds, modulator.site.condition_dim, len(x)
    if "self" in kinds:
        return None
    if "raw" in kinds:
        if widths := getattr(modulator.config, "widths", None):
            return {name: draw((batch, own)) for name, own in widths.items()}
        return torch.zeros(batch, dtype=torch.long, device=x.device)
    if "global" in kinds:
        return draw((batch, width))
    if "set" in kinds:
        tokens = draw((batch, 3, width))
        return dict.fromkeys(modulator.sets, tokens) if modulator.sets else tokens
    shape = list(x.shape)
    shape[modulator.site.channel_dim] = width
    return draw(tuple(shape))
