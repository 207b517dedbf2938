"""What a step sees follows from seed and step alone, however many share it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condmod_lab.order import Draws, Order, held_out_draws

SHAPE = (1, 2, 3)


def order(seed: int = 0, count: int = 50, batch: int = 8, label_drop: float = 0.1) -> Order:
    return Order(seed, count, batch, SHAPE, label_drop)


def same(one: Draws, two: Draws) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(two, name))
        for name in ("places", "noise", "t", "present")
    )


@given(st.integers(0, 2**31), st.integers(0, 10_000))
def test_a_step_sees_the_same_whatever_was_asked_before(seed: int, step: int) -> None:
    first = order(seed).at(step)
    torch.randn(3)
    again = order(seed)
    again.at(step + 1)
    assert same(first, again.at(step))


@pytest.mark.parametrize(("count", "batch"), [(48, 8), (50, 8), (7, 7), (9, 1)])
def test_an_epoch_visits_images_once_and_each_epoch_in_an_order_of_its_own(
    count: int, batch: int
) -> None:
    steps = count // batch
    epochs = [
        torch.cat([order(0, count, batch).at(epoch * steps + n).places for n in range(steps)])
        for epoch in range(3)
    ]
    for visited in epochs:
        assert len(visited.unique()) == len(visited) == steps * batch
        assert 0 <= visited.min() <= visited.max() < count
    assert all(not torch.equal(one, two) for one, two in pairwise(epochs))


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_processes_and_parts_share_a_step_out_without_rest(processes: int, parts: int) -> None:
    whole = order(batch=16).at(3)
    shared = [
        whole.part(process, processes).part(part, parts)
        for process in range(processes)
        for part in range(parts)
    ]
    joined = Draws(
        *(
            torch.cat([getattr(each, name) for each in shared])
            for name in ("places", "noise", "t", "present")
        )
    )
    assert same(whole, joined)


def test_seeds_and_steps_share_nothing() -> None:
    noises = [order(seed).at(step).noise for seed in range(3) for step in range(3)]
    assert len({float(noise.sum()) for noise in noises}) == len(noises)


@pytest.mark.parametrize("label_drop", [0.0, 0.3, 1.0])
def test_labels_are_withheld_as_often_as_asked(label_drop: float) -> None:
    some = order(label_drop=label_drop, batch=50)
    present = torch.cat([some.at(step).present for step in range(100)])
    assert 1 - present.double().mean() == pytest.approx(label_drop, abs=0.03)


def test_what_layers_draw_differs_by_step_and_process_and_comes_back() -> None:
    drawn = []
    for step, process in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        order().seed_layers(step, process)
        drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3


def test_held_out_images_are_met_once_in_every_span_of_time() -> None:
    draws = held_out_draws(0, 40, SHAPE, times=4)
    for span, some in enumerate(draws):
        assert torch.equal(some.places, torch.arange(40))
        assert ((some.t >= span / 4) & (some.t < (span + 1) / 4)).all()
        assert some.present.all()
    assert all(
        same(one, two) for one, two in zip(draws, held_out_draws(0, 40, SHAPE, 4), strict=True)
    )
    assert not same(draws[0], held_out_draws(1, 40, SHAPE, 4)[0])
