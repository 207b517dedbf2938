"""The measure passes real digits and stops the fakes that accuracy and diversity let through."""

import math
from dataclasses import replace
from typing import Any

import pytest
import sklearn.svm
import torch
from hypothesis import given
from hypothesis import strategies as st

from condmod_lab import metrics as room
from condmod_lab.data import Images, Split, load_digits
from condmod_lab.errors import ConfigError, DataError, DivergedError
from condmod_lab.metrics import GOALS, Judge, diversity, missed_goals, summarise

CLASSES = 10


@pytest.fixture(scope="module")
def split() -> Split:
    return load_digits()


def test_real_digits_that_nothing_was_fitted_on_reach_every_goal(split: Split) -> None:
    """Half of the held-out digits, judged by the other half, stand in for a perfect sampler."""
    half = torch.arange(len(split.held_out)) % 2 == 0
    unseen, reference = _subset(split.held_out, half), _subset(split.held_out, ~half)
    metrics = Judge(replace(split, held_out=reference)).measure(unseen.images, unseen.labels)
    assert missed_goals(metrics) == []
    assert metrics["diversity_ratio"] == pytest.approx(1, abs=0.1)
    assert metrics["novelty_ratio"] == pytest.approx(1, abs=0.1)


def test_copies_of_training_digits_fail_by_novelty_alone(split: Split) -> None:
    chosen = torch.randperm(len(split.train), generator=torch.Generator().manual_seed(0))[:1000]
    metrics = Judge(split).measure(split.train.images[chosen], split.train.labels[chosen])
    assert missed_goals(metrics) == ["novelty_ratio"]
    assert metrics["novelty_ratio"] == pytest.approx(0, abs=1e-3)


def test_class_means_with_noise_fail_although_they_are_read_well_and_diverse(split: Split) -> None:
    labels = torch.arange(1000) % CLASSES
    means = torch.stack([split.train.of_class(label).mean(0) for label in range(CLASSES)])
    noise = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    metrics = Judge(split).measure((means[labels] + 0.5 * noise).clamp(-1, 1), labels)
    assert {"novelty_ratio", "precision"} == set(missed_goals(metrics))
    assert metrics["conditional_accuracy"] > 0.95
    assert metrics["diversity_ratio"] > 0.7
    assert metrics["precision"] < 0.2


def test_one_image_for_every_class_fails_by_diversity(split: Split) -> None:
    labels = torch.arange(100) % CLASSES
    firsts = torch.stack([split.held_out.of_class(label)[0] for label in range(CLASSES)])
    metrics = Judge(split).measure(firsts[labels], labels)
    assert "diversity_ratio" in missed_goals(metrics)


def test_diversity_is_the_mean_distance_within_classes() -> None:
    pixels = torch.arange(2 * CLASSES, dtype=torch.float32)[:, None]
    labels = torch.arange(2 * CLASSES) // 2
    assert diversity(pixels, labels) == pytest.approx(1.0)
    assert diversity(pixels * 3, labels) == pytest.approx(3.0)


def test_a_goal_is_missed_on_either_side() -> None:
    good = {name: low for name, (low, _) in GOALS.items()}
    assert missed_goals(good) == []
    assert missed_goals({**good, "novelty_ratio": 1.31}) == ["novelty_ratio"]
    assert missed_goals({**good, "precision": float("nan")}) == ["precision"]


def test_the_figures_of_half_of_the_held_out_digits_are_what_they_always_were(
    split: Split,
) -> None:
    half = torch.arange(len(split.held_out)) % 2 == 0
    unseen, reference = _subset(split.held_out, half), _subset(split.held_out, ~half)
    metrics = Judge(replace(split, held_out=reference)).measure(unseen.images, unseen.labels)
    assert metrics == pytest.approx(
        {
            "conditional_accuracy": 220 / 225,
            "classifier_accuracy": 223 / 225,
            "diversity_ratio": 0.999646,
            "novelty_ratio": 1.012512,
            "precision": 206 / 225,
            "recall": 211 / 225,
        },
        abs=1e-6,
    )


@given(st.lists(st.integers(2, 6), min_size=1, max_size=5), st.integers(0, 9))
def test_diversity_counts_every_class_alike_however_many_images_it_has(
    counts: list[int], seed: int
) -> None:
    pixels = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed))
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    naive = [
        torch.tensor(
            [
                float((one - other).norm())
                for place, one in enumerate(members)
                for other in members[place + 1 :]
            ]
        ).mean()
        for members in pixels.split(counts)
    ]
    assert diversity(pixels, labels) == pytest.approx(float(torch.stack(naive).mean()), rel=1e-5)


@pytest.mark.parametrize("samples", [40, 43])
def test_every_figure_is_the_summary_of_its_single_values(split: Split, samples: int) -> None:
    judge, labels = Judge(split), torch.arange(samples) % CLASSES
    images = torch.randn(samples, 1, 8, 8).clamp(-1, 1)
    each, figures = judge.each(images, labels), judge.measure(images, labels)
    assert {name: len(values) for name, values in each.items()} == {
        "conditional_accuracy": samples,
        "diversity_ratio": samples,
        "novelty_ratio": samples,
        "precision": samples,
        "recall": 450,
    }
    assert figures.pop("classifier_accuracy") == pytest.approx(0.984, abs=1e-3)
    assert figures == {name: summarise(name, values) for name, values in each.items()}
    held_out = split.held_out
    own = diversity(held_out.images.flatten(1), held_out.labels)
    assert figures["diversity_ratio"] == pytest.approx(diversity(images.flatten(1), labels) / own)


def test_the_single_values_are_those_of_the_single_images(split: Split) -> None:
    """One sample of a class is a training digit, one is noise, and both are asked for one class."""
    labels = torch.arange(40) % CLASSES
    images = torch.stack(
        [split.held_out.of_class(int(label))[place] for place, label in enumerate(labels)]
    )
    images[3] = split.train.of_class(3)[0]
    images[13] = torch.randn(1, 8, 8)
    images[15] = split.held_out.of_class(6)[0]
    each = Judge(split).each(images, labels)
    assert each["novelty_ratio"].argmin() == 3
    assert each["novelty_ratio"][3] == pytest.approx(0, abs=1e-3)
    assert each["novelty_ratio"].argmax() == 13
    assert each["diversity_ratio"].argmax() == 13
    assert each["precision"][13] == 0
    assert each["conditional_accuracy"][15] == 0
    assert each["conditional_accuracy"].sum() >= 36


def test_novelty_is_a_median_and_every_other_figure_a_mean() -> None:
    values = torch.tensor([0.0, 0.0, 9.0])
    assert summarise("novelty_ratio", values) == 0
    assert {summarise(name, values) for name in GOALS if name != "novelty_ratio"} == {3}


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 6, 5), (3, 32, 32)])
@pytest.mark.parametrize("classes", [2, 13])
def test_any_number_of_classes_and_any_shape_can_be_measured(
    shape: tuple[int, int, int], classes: int
) -> None:
    world = _world(classes, shape, 20)
    fresh = _clouds(classes, shape, 4, seed=2)
    metrics = Judge(world).measure(fresh.images, fresh.labels)
    assert metrics["conditional_accuracy"] > 0.9
    assert metrics["classifier_accuracy"] > 0.9
    assert metrics["diversity_ratio"] == pytest.approx(1, abs=0.15)
    assert metrics["novelty_ratio"] == pytest.approx(1, abs=0.15)
    copies = Images(world.train.images, world.train.labels)
    assert Judge(world).measure(copies.images, copies.labels)["novelty_ratio"] < 0.01


def test_of_large_data_a_fixed_part_is_fitted_on_and_compared_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted, svc = [], sklearn.svm.SVC

    class Recording(svc):
        def fit(self, features: Any, labels: Any) -> Any:
            fitted.append((features, labels))
            return super().fit(features, labels)

    monkeypatch.setattr(sklearn.svm, "SVC", Recording)
    monkeypatch.setattr(room, "LIMIT", 30)
    world, fresh = _world(3, (1, 4, 4), 50), _clouds(3, (1, 4, 4), 20, seed=2)
    first = Judge(world).each(fresh.images, fresh.labels)
    second = Judge(world).each(fresh.images, fresh.labels)
    (features, labels), again = fitted
    assert features.shape == (30, 16)
    assert (features == again[0]).all()
    assert torch.from_numpy(labels).bincount().tolist() == [10, 10, 10]
    assert (len(first["recall"]), len(first["precision"])) == (30, 60)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_is_compared_with_more_images_than_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, cdist = [], torch.cdist

    def recording(points: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        sizes.append(len(reference))
        return cdist(points, reference)

    monkeypatch.setattr(torch, "cdist", recording)
    monkeypatch.setattr(room, "LIMIT", 30)
    fresh = _clouds(3, (1, 4, 4), 20, seed=2)
    Judge(_world(3, (1, 4, 4), 50)).measure(fresh.images, fresh.labels)
    assert max(sizes) == 30


def test_a_rare_class_is_not_lost_in_the_part_that_stands_for_large_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "LIMIT", 20)
    many, rare = _clouds(1, (1, 4, 4), 200), _clouds(2, (1, 4, 4), 4)
    train = Images(
        torch.cat([many.images, rare.of_class(1)]),
        torch.cat([many.labels, torch.ones(4, dtype=torch.long)]),
    )
    judge = Judge(Split(train, rare, ("many", "rare")))
    fresh = _clouds(2, (1, 4, 4), 5, seed=2)
    assert judge.accuracy(fresh.images, fresh.labels) == 1


def test_more_classes_than_fit_still_have_two_images_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LIMIT", 10)
    world, fresh = _world(9, (1, 4, 4), 12), _clouds(9, (1, 4, 4), 2, seed=2)
    metrics = Judge(world).measure(fresh.images, fresh.labels)
    assert metrics["diversity_ratio"] == pytest.approx(1, abs=0.5)


def test_large_numbers_of_samples_are_measured_in_parts_to_the_same_end(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = _subset(split.train, torch.arange(len(split.train)) < 100)
    whole = Judge(split).measure(chosen.images, chosen.labels)
    monkeypatch.setattr(room, "_ROWS", 37)
    assert Judge(split).measure(chosen.images, chosen.labels) == pytest.approx(whole, abs=1e-3)


def test_a_class_with_fewer_than_two_samples_is_refused(split: Split) -> None:
    labels = torch.arange(18) % CLASSES
    for refuse in (
        lambda: Judge(split).check(labels),
        lambda: Judge(split).measure(torch.zeros(18, 1, 8, 8), labels),
    ):
        with pytest.raises(ConfigError) as caught:
            refuse()
        assert str(caught.value) == (
            "every class needs at least 2 samples, which are compared with each other; "
            "got 1 of '8', 1 of '9'; set sampling.samples to at least 20, "
            "twice the number of classes"
        )
    Judge(split).check(torch.arange(20) % CLASSES)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_of_values_that_are_no_numbers_are_a_clear_error(split: Split, value: float) -> None:
    images, labels = torch.zeros(20, 1, 8, 8), torch.arange(20) % CLASSES
    images[3:5, 0, 2, 2] = value
    for refuse in (Judge(split).measure, Judge(split).accuracy):
        with pytest.raises(DivergedError) as caught:
            refuse(images, labels)
        assert str(caught.value) == (
            "2 of 20 images hold values that are no numbers, so nothing can be read in them; "
            "a smaller training.learning_rate or sampling.guidance may help"
        )


def test_classes_whose_images_are_all_the_same_cannot_scale_diversity() -> None:
    world = _world(2, (1, 4, 4), 8)
    prototypes = torch.stack([world.held_out.of_class(label)[0] for label in range(2)])
    same = Images(prototypes[world.held_out.labels], world.held_out.labels)
    with pytest.raises(DataError) as caught:
        Judge(replace(world, held_out=same)).check(torch.arange(4) % 2)
    assert str(caught.value) == (
        "diversity is scaled by how far the held-out images of a class are apart; got the same "
        "image again and again in every class; remove doubles from the data"
    )


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 64, 64)])
def test_held_out_images_that_are_training_images_too_cannot_scale_novelty(
    shape: tuple[int, int, int],
) -> None:
    world = _world(2, shape, 30)
    images = world.train.images + 1e-4 * torch.randn_like(world.train.images)
    alike = Images(images, world.train.labels)
    with pytest.raises(DataError) as caught:
        Judge(replace(world, held_out=alike)).check(torch.arange(4) % 2)
    assert str(caught.value) == (
        "novelty is scaled by how far held-out images are from the nearest training image; "
        "got most of them in both; remove doubles from the data"
    )


def _subset(images: Images, chosen: torch.Tensor) -> Images:
    return Images(images.images[chosen], images.labels[chosen])


def _clouds(classes: int, shape: tuple[int, int, int], count: int, *, seed: int = 1) -> Images:
    """Images that are easy to tell apart: noise around one random image for each class."""
    centres = torch.randn(99, *shape, generator=torch.Generator().manual_seed(0))[:classes]
    labels = torch.arange(classes).repeat_interleave(count)
    noise = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(seed))
    return Images((0.6 * centres[labels] + 0.2 * noise).clamp(-1, 1), labels)


def _world(classes: int, shape: tuple[int, int, int], count: int) -> Split:
    """Clouds, three quarters of each to learn from."""
    whole = _clouds(classes, shape, count)
    held_out = torch.arange(len(whole)) % 4 == 0
    names = tuple(f"class {label}" for label in range(classes))
    return Split(_subset(whole, ~held_out), _subset(whole, held_out), names)
