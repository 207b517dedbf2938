"""What a training run needs to go on as if it had never stopped, as tensors and plain JSON.

Random draws and the order of the data need nothing here: `condmod_lab.order` works them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from condmod import CheckpointError
from condmod.serialization import load_state
from condmod_lab.sharding import part_of

AVERAGE: Final = "average."
_MODEL: Final = "model."
_OPTIMIZER: Final = "optimizer."


def average_tensors(average: AveragedModel) -> dict[str, Tensor]:
    """The averaged weights, which samples are drawn with."""
    return {AVERAGE + name: value for name, value in average.module.state_dict().items()}


def training_tensors(net: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights and optimiser, by the parameters' names."""
    states = optimizer.state_dict()["state"]  # nothing of what no gradient has reached
    return {_MODEL + name: value for name, value in net.state_dict().items()} | {
        f"{_OPTIMIZER}{key}.{name}": value
        for place, name in enumerate(trained(net))
        for key, value in states.get(place, {}).items()
    }


def restore(
    tensors: Mapping[str, Tensor],
    net: nn.Module,
    optimizer: Optimizer,
    average: AveragedModel,
    *,
    finished: bool,
) -> None:
    """Put back what `average_tensors` and, of a run that has not finished, `training_tensors` gave.

    Raises:
        CheckpointError: what is missing, unexpected, or of another shape.
    """
    _load(average.module, within(tensors, AVERAGE))
    if finished:
        return
    _load(net, within(tensors, _MODEL))
    held = within(tensors, _OPTIMIZER)
    keys = sorted({name.partition(".")[0] for name in held})
    states: dict[int, dict[str, Tensor]] = {}
    for place, (name, parameter) in enumerate(trained(net).items()):
        values = {key: held.get(f"{key}.{name}") for key in keys}
        if all(value is None for value in values.values()):
            continue  # no gradient has reached it
        for key, value in values.items():
            if value is None or value.shape not in (parameter.shape, ()):
                raise CheckpointError(
                    f"the checkpoint does not fit the optimiser: {key} of {name} is "
                    + ("missing" if value is None else f"of shape {tuple(value.shape)}")
                )
            states.setdefault(place, {})[key] = part_of(value, parameter)
    groups: Any = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a module, of which each process may hold a part."""
    held = module.state_dict()
    load_state(module, {name: part_of(value, held.get(name)) for name, value in tensors.items()})


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an optimiser is given, by name."""
    return {name: value for name, value in net.named_parameters() if value.requires_grad}


def within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
