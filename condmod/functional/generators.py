"""What generators are made of: layers that are drawn once, and their starts."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from condmod.functional.parts import Activation, activation


def blank_linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """A Linear whose memory is not filled: `reset_parameters` of its owner draws it, once."""
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta")
    return layer.to_empty(device=torch.get_default_device())


def mlp(widths: Sequence[int], act: Activation) -> nn.Sequential:
    """Linear and activation in turn, through `widths` (input width first); blank, as above."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [blank_linear(before, after), activation(act)]
    return nn.Sequential(*layers)


def low_rank(in_features: int, rank: int, out_features: int) -> nn.Sequential:
    """Two Linears without bias, through `rank` channels; blank, as above."""
    return nn.Sequential(
        blank_linear(in_features, rank, bias=False), blank_linear(rank, out_features, bias=False)
    )


def reset_linears(module: nn.Module) -> None:
    """Draw every Linear inside `module` as torch does, in order of registration."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()


def reset_chunks(layer: nn.Linear, chunks: int) -> None:
    """Draw a fused Linear as `chunks` separate Linears drawn one after the other would be."""
    rows = layer.out_features // chunks
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    parts = [nn.Linear(layer.in_features, rows, **like) for _ in range(chunks)]
    fill(layer.weight, torch.cat([part.weight for part in parts]))
    fill(layer.bias, torch.cat([part.bias for part in parts]))


def reset_constant(layer: nn.Linear, starts: Sequence[float | int]) -> None:
    """Set a Linear to give a constant whatever it reads: `starts`, each for an equal share of C."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        share = layer.out_features // len(starts)
        fill(layer.bias, torch.tensor([float(s) for s in starts]).repeat_interleave(share))


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter, which may be sharded (a DTensor) or on meta.

    In-place writes to a chunk of a DTensor are lost; a start that differs between the parts of
    a parameter is computed as a whole and written by this.
    """
    with torch.no_grad():
        if hasattr(parameter, "placements"):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(parameter, DTensor)
            value = distribute_tensor(
                value.detach().to(parameter.device), parameter.device_mesh, parameter.placements
            )
        parameter.copy_(value)
