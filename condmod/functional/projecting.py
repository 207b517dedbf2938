"""The linear step of generators, of one site or of all sites of a bank.

Shapes: B batch, D condition, N what one site's projection gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from condmod.functional.layout import is_recorded

# With few rows a projection is one pass over its weights, and this BLAS reads them faster as
# W·cᵀ than as c·Wᵀ, as soon as they come from memory. What stays in a cache loses by it.
# Measured on two cores of an EPYC with MKL, 1 and 2 threads, widths from 128 to 1152.
_LARGE: Final = 16 * 2**20
_FEW_ROWS: Final = 4
_SOME_ROWS: Final = 8  # up to them where the condition is narrow
_NARROW: Final = 512
_FORWARD: Final = nn.Linear.forward
_MEASURED: Final = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


def project(c: Tensor, layers: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
    """layer(c) for every layer, in the layout that is fastest for so many rows.

    On a CPU, float32 rows (B, D) with B up to 4 (up to 8 where D is at most 512) go through plain
    `nn.Linear`s that hold 16 MiB and more together as W·cᵀ, where no gradient is recorded,
    nothing is compiled and there is no autocast. Whatever else comes, and whatever else the layers
    are (parametrized, sharded, quantised, with hooks), they are called. Both give the same up to
    rounding, with the same shape and layout in memory.

    Args:
        c: what all of them read, (B, D) or (B, *positions, D).
        layers: the linear steps.

    Returns:
        Of each layer (B, N) or (B, *positions, N).
    """
    # the sizes that are compared below would be constants of a graph
    in_graph = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if in_graph:
        return [layer(c) for layer in layers]
    if _by_weight(c, layers):
        return _transposed(c, cast(Sequence[nn.Linear], layers))
    return [_called(c, layer) for layer in layers]


def _called(c: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """layer(c), past the call of a module where that does nothing else."""
    if type(layer) is not nn.Linear or not _calls_linear(layer):
        return layer(c)
    parameters = layer._parameters
    return F.linear(c, cast(Tensor, parameters["weight"]), parameters["bias"])


def _by_weight(c: Tensor, layers: Sequence[Any]) -> bool:
    """Whether W·cᵀ gives the same as calling the layers, and sooner; what is tiny is told first."""
    weights, total = [], 0
    for layer in layers:
        if type(layer) is not nn.Linear:
            return False
        weight = layer.__dict__["_parameters"].get("weight")  # nn.Module.__getattr__ is slow
        if type(weight) is not nn.Parameter:
            return False
        weights.append(weight)
        total += weight.nbytes
    if total < _LARGE or type(c) is not Tensor or c.ndim != 2:
        return False
    if not 0 < c.shape[0] <= (_SOME_ROWS if c.shape[1] <= _NARROW else _FEW_ROWS):
        return False
    return _as_measured(c, weights) and all(_calls_linear(layer) for layer in layers)


def _as_measured(c: Tensor, weights: Sequence[nn.Parameter]) -> bool:
    """Whether float32 comes on a CPU, and no gradient is recorded."""
    if not (_MEASURED and c.is_cpu) or torch.is_autocast_enabled("cpu"):
        return False
    return not is_recorded(c, *weights) and all(
        w.dtype == torch.float32 and w.is_cpu and w.shape[1] == c.shape[1] for w in weights
    )


def _calls_linear(layer: nn.Linear) -> bool:
    """Whether a call is F.linear with the layer's own parameters and nothing else."""
    own = layer.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or nn.Linear.forward is not _FORWARD
        or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    ):
        return False
    parameters = own["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias", layer)
    return type(weight) is nn.Parameter and type(bias) in (nn.Parameter, type(None))


def _transposed(c: Tensor, layers: Sequence[nn.Linear]) -> list[Tensor]:
    batch = c.shape[0]
    columns = torch.cat([c, c]).t() if batch == 1 else c.t()  # one column would be a slow gemv
    found = []
    for layer in layers:
        parameters = layer._parameters
        weight, bias = cast(Tensor, parameters["weight"]), parameters["bias"]
        if bias is None:
            projected = torch.mm(weight, columns)
        else:
            projected = torch.addmm(bias[:, None], weight, columns)
        found.append(projected.t()[:batch].contiguous())
    return found
