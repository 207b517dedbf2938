"""What a checkpoint keeps of training comes back as it was, also where no gradient has been."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from condmod import CheckpointError
from condmod_lab.state import average_tensors, restore, training_tensors


class Half(nn.Module):
    """One of its parameters has no part in what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.randn(3))
        self.weight = nn.Parameter(torch.randn(2))
        self.bias = nn.Parameter(torch.randn(1))


def begun(steps: int) -> tuple[Half, torch.optim.AdamW, AveragedModel]:
    net = Half()
    optimizer = torch.optim.AdamW(net.parameters())
    average = AveragedModel(net)
    for _ in range(steps):
        (net.weight * net.bias).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(net)
    return net, optimizer, average


def kept(net: Half, optimizer: torch.optim.AdamW, average: AveragedModel) -> dict[str, Tensor]:
    tensors = average_tensors(average) | training_tensors(net, optimizer)
    return {name: value.clone() for name, value in tensors.items()}


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_what_no_gradient_has_reached_is_kept_and_comes_back_without_a_state(steps: int) -> None:
    """As a spare parameter, and every parameter while fp16 skips its first steps."""
    before = begun(steps)
    tensors = kept(*before)
    assert not any(name.startswith("optimizer") and "spare" in name for name in tensors)
    after = begun(0)
    net, optimizer, average = after
    restore(tensors, net, optimizer, average, finished=False)
    again = kept(*after)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(value, again[name]) for name, value in tensors.items())


def test_a_state_that_lacks_a_part_or_fits_no_parameter_is_refused() -> None:
    tensors = kept(*begun(2))
    net, optimizer, average = begun(0)
    lacking = {name: value for name, value in tensors.items() if name != "optimizer.step.weight"}
    with pytest.raises(CheckpointError) as caught:
        restore(lacking, net, optimizer, average, finished=False)
    assert str(caught.value) == (
        "the checkpoint does not fit the optimiser: step of weight is missing"
    )
    wide = {**tensors, "optimizer.exp_avg.weight": torch.zeros(3)}
    with pytest.raises(CheckpointError) as caught:
        restore(wide, net, optimizer, average, finished=False)
    assert str(caught.value) == (
        "the checkpoint does not fit the optimiser: exp_avg of weight is of shape (3,)"
    )
