"""The measure passes real digits and stops the fakes that accuracy and diversity let through."""

import pytest
import torch

from condmod_lab.data import CLASSES, Digits, Split, load_digits
from condmod_lab.metrics import GOALS, Judge, diversity, missed_goals


@pytest.fixture(scope="module")
def split() -> Split:
    return load_digits()


def test_the_split_holds_out_a_quarter_of_every_class_and_shares_nothing(split: Split) -> None:
    assert (len(split.train), len(split.held_out)) == (1347, 450)
    assert split.train.images.shape == (1347, 1, 8, 8)
    assert (split.train.images.min(), split.train.images.max()) == (-1, 1)
    whole = torch.cat([split.train.labels, split.held_out.labels]).bincount()
    quarter = split.held_out.labels.bincount() / whole
    assert (quarter - 0.25).abs().max() < 0.01
    apart = torch.cdist(split.held_out.images.flatten(1), split.train.images.flatten(1))
    assert apart.min() > 0


def test_real_digits_that_nothing_was_fitted_on_reach_every_goal(split: Split) -> None:
    """Half of the held-out digits, judged by the other half, stand in for a perfect sampler."""
    half = torch.arange(len(split.held_out)) % 2 == 0
    unseen, reference = _subset(split.held_out, half), _subset(split.held_out, ~half)
    metrics = Judge(Split(split.train, reference)).measure(unseen.images, unseen.labels)
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


def _subset(digits: Digits, chosen: torch.Tensor) -> Digits:
    return Digits(digits.images[chosen], digits.labels[chosen])
