"""The flow's formulas, held against networks whose answer is known."""

import pytest
import torch
from torch import Tensor

from condmod_lab.flow import draw, flow_errors, guided
from condmod_lab.order import Order


def labelled(x: Tensor, t: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """A velocity that shows what it was asked: the label where present, else -1; plus time."""
    value = torch.where(present, labels.float(), torch.tensor(-1.0)) + t
    return value.view(-1, 1, 1, 1).expand_as(x)


X = torch.zeros(3, 1, 2, 2)
LABELS = torch.tensor([0, 4, 9])
HERE = torch.tensor([True, True, True])


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
def test_guidance_goes_from_the_null_through_the_labelled_velocity(guidance: float) -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    null, conditional = -1 + t, LABELS + t
    expected = null + guidance * (conditional - null)
    assert torch.allclose(guided(labelled, X, t, LABELS, HERE, guidance)[:, 0, 0, 0], expected)


def test_guidance_one_asks_the_network_once() -> None:
    calls = []

    def counted(x: Tensor, t: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        calls.append(present.tolist())
        return labelled(x, t, labels, present)

    guided(counted, X, torch.zeros(3), LABELS, HERE, 1.0)
    assert calls == [[True] * 3]


def test_euler_steps_add_up_the_velocity_at_the_left_ends() -> None:
    def time(x: Tensor, t: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        return t.view(-1, 1, 1, 1).expand_as(x)

    drawn = draw(time, X, LABELS, steps=4)  # (0 + 1/4 + 2/4 + 3/4) / 4
    assert torch.allclose(drawn, torch.full_like(X, 0.375))


def test_absent_labels_reach_the_network_as_absent_and_samples_are_clamped() -> None:
    present = torch.tensor([True, False, False])
    drawn = draw(labelled, X, LABELS, present=present, steps=1)
    assert drawn[:, 0, 0, 0].tolist() == [0.0, -1.0, -1.0]
    assert draw(labelled, X, LABELS, steps=1)[2, 0, 0, 0] == 1.0


def test_the_error_is_that_of_the_straight_path_from_noise_to_data() -> None:
    """The exact velocity has error 0: from x_t and x1 it is (x1 - x_t) / (1 - t)."""
    data, labels = torch.randn(64, 1, 2, 2, dtype=torch.float64), torch.arange(64)
    draws = Order(seed=0, count=64, batch=64, shape=(1, 2, 2), label_drop=0.5).at(0)

    def exact(x: Tensor, t: Tensor, given: Tensor, present: Tensor) -> Tensor:
        assert torch.equal(given, labels)
        assert torch.equal(present, draws.present)
        return (data - x) / (1 - t).view(-1, 1, 1, 1)

    assert flow_errors(exact, data, labels, draws).max() < 1e-6
    still = flow_errors(lambda x, *_: torch.zeros_like(x), data, labels, draws)
    expected = (data - draws.noise).square().flatten(1).mean(1)
    assert torch.allclose(still, expected)
