"""The measure of a sampler, made so that neither copies nor blurred means can pass.

A classifier fitted on the training split alone reads the samples. Accuracy and diversity let two
fakes through: copies of training digits, and class means with noise. Novelty stops the first,
precision the second.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from condmod_lab.data import CLASSES, Split

NEIGHBOURS: Final = 3
GOALS: Final[dict[str, tuple[float, float]]] = {
    "conditional_accuracy": (0.95, math.inf),
    "diversity_ratio": (0.7, math.inf),
    "novelty_ratio": (0.7, 1.3),
    "precision": (0.75, math.inf),
}


def missed_goals(metrics: dict[str, Any]) -> list[str]:
    """The names of the goals that these metrics do not reach."""
    return [name for name, (low, high) in GOALS.items() if not low <= metrics[name] <= high]


@dataclass(frozen=True)
class Judge:
    """Compares samples with real digits: fitted on the training split, scaled by the held-out one.

    Distances are L2 between images of 64 pixels from -1 to 1.
    """

    split: Split

    def measure(
        self, images: Float[Tensor, "B 1 8 8"], labels: Int[Tensor, " B"]
    ) -> dict[str, float]:
        """All figures of samples that were drawn under these labels.

        Args:
            images: (B, 1, 8, 8), at least two of each class.
            labels: (B,), the class that each sample was asked to show.

        Returns:
            conditional_accuracy: share of samples read as their label.
            classifier_accuracy: the same for held-out digits, the ceiling.
            diversity_ratio: mean L2 within a class, over that of held-out digits.
            novelty_ratio: median L2 to the nearest training digit, over the held-out digits' own.
            precision: share of samples within the manifold of held-out digits (k-NN, k=3).
            recall: share of held-out digits within the manifold of the samples.
        """
        pixels = images.flatten(1)
        held_out = self.split.held_out.images.flatten(1)
        return {
            "conditional_accuracy": self.accuracy(images, labels),
            "classifier_accuracy": self.accuracy(
                self.split.held_out.images, self.split.held_out.labels
            ),
            "diversity_ratio": diversity(pixels, labels)
            / diversity(held_out, self.split.held_out.labels),
            "novelty_ratio": self._novelty(pixels) / self._novelty(held_out),
            "precision": _within_manifold(pixels, held_out),
            "recall": _within_manifold(held_out, pixels),
        }

    def accuracy(self, images: Float[Tensor, "B 1 8 8"], labels: Int[Tensor, " B"]) -> float:
        """Share of images that the classifier reads as their label."""
        return float((self.read(images) == labels).double().mean())

    def read(self, images: Float[Tensor, "B 1 8 8"]) -> Int[Tensor, " B"]:
        """The class that the classifier sees in each image, (B,)."""
        return torch.from_numpy(self._classifier.predict(_features(images)))

    @cached_property
    def _classifier(self) -> Any:
        from sklearn.svm import SVC

        train = self.split.train
        return SVC(gamma=0.064).fit(_features(train.images), train.labels.numpy())

    def _novelty(self, pixels: Tensor) -> float:
        nearest = torch.cdist(pixels, self.split.train.images.flatten(1)).amin(1)
        return float(nearest.median())


def diversity(pixels: Float[Tensor, "B P"], labels: Int[Tensor, " B"]) -> float:
    """Mean L2 distance between two different images of a class, averaged over the classes."""
    means = []
    for label in range(CLASSES):
        members = pixels[labels == label]
        count = len(members)
        means.append(torch.cdist(members, members).sum() / (count * (count - 1)))
    return float(torch.stack(means).mean())


def _within_manifold(points: Tensor, reference: Tensor) -> float:
    """Share of points that lie closer to some reference point than its k-th neighbour does."""
    radii = torch.cdist(reference, reference).kthvalue(NEIGHBOURS + 1, dim=1).values
    return float((torch.cdist(points, reference) <= radii).any(1).double().mean())


def _features(images: Tensor) -> Any:
    """What the classifier reads: 64 pixels from 0 to 1."""
    return ((images.flatten(1) + 1) / 2).numpy()
