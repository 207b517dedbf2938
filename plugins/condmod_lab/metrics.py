"""The measure of a sampler, made so that neither copies nor blurred means can pass.

A classifier fitted on the training split alone reads the samples. Accuracy and diversity let two
fakes through: copies of training images, and class means with noise. Novelty stops the first,
precision the second.

Any number of classes and any (C, H, W) can be measured; of large data a fixed part stands for the
whole, so that the measure takes no longer. The goals were found for the digits and hold for them
only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from condmod_lab.data import Images, Split, listed
from condmod_lab.errors import ConfigError, DataError, DivergedError
from condmod_lab.paired import FIGURES

NEIGHBOURS: Final = 3
LIMIT: Final = 5000
"""Of more images than that, a fixed choice is fitted on or compared with."""
GOALS: Final[dict[str, tuple[float, float]]] = {
    "conditional_accuracy": (0.95, math.inf),
    "diversity_ratio": (0.7, math.inf),
    "novelty_ratio": (0.7, 1.3),
    "precision": (0.75, math.inf),
}
_REDUCE: Final = {figure.name: figure.reduce for figure in FIGURES}
_GAMMA_TIMES_VALUES: Final = 4.096  # gamma 0.064 for the digits' 64 pixels
_SAME: Final = 1e-3  # root mean square per value, an eighth of a gray level; cdist's rounding
_SEED: Final = 0
_ROWS: Final = 2048  # of a distance matrix at a time


def missed_goals(metrics: dict[str, Any]) -> list[str]:
    """The names of the goals that these metrics do not reach; the digits' goals."""
    return [name for name, (low, high) in GOALS.items() if not low <= metrics[name] <= high]


def summarise(name: str, values: Float[Tensor, " N"]) -> float:
    """One figure of `Judge.measure` from its values in `Judge.each`: a median or a mean."""
    return float(values.median() if _REDUCE[name] == "median" else values.mean())


@dataclass(frozen=True)
class Judge:
    """Compares samples with real images: fitted on the training split, scaled by the held-out one.

    Distances are L2 between flattened images from -1 to 1. Of a split, and of the samples where
    they are the reference, at most `LIMIT` images count: a fixed choice, the classes in turn.

    Attributes:
        split: the real images.
    """

    split: Split

    def measure(
        self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"]
    ) -> dict[str, float]:
        """All figures of samples that were drawn under these labels.

        Args:
            images: (B, C, H, W), at least two of each class.
            labels: (B,), the class that each sample was asked to show.

        Returns:
            conditional_accuracy: share of samples read as their label.
            classifier_accuracy: the same for held-out images, the ceiling.
            diversity_ratio: mean L2 within a class, over that of held-out images.
            novelty_ratio: median L2 to the nearest training image, over the held-out ones' own.
            precision: share of samples within the manifold of held-out images (k-NN, k=3).
            recall: share of held-out images within the manifold of the samples.

        Raises:
            ConfigError: a class has fewer than two samples.
            DataError: the split's own images are alike, so that nothing can be scaled by them.
        """
        figures = {
            name: summarise(name, values) for name, values in self.each(images, labels).items()
        }
        return {**figures, "classifier_accuracy": self.ceiling}

    def each(
        self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"]
    ) -> dict[str, Tensor]:
        """The values of the single images that `summarise` makes the figures of.

        Args:
            images: (B, C, H, W), at least two of each class.
            labels: (B,), the class that each sample was asked to show.

        Returns:
            conditional_accuracy: (B,), 1 where the sample is read as its label, else 0.
            diversity_ratio: (B,), mean L2 to the other samples of its class over the held-out
                images' diversity; where classes have unequal numbers of samples, weighted so that
                every class counts alike.
            novelty_ratio: (B,), L2 to the nearest training image over the held-out ones' median.
            precision: (B,), 1 where the sample is within the manifold of held-out images.
            recall: (N,), 1 where the held-out image is within the manifold of the samples.

        Raises:
            ConfigError: a class has fewer than two samples.
            DataError: the split's own images are alike, so that nothing can be scaled by them.
        """
        self.check(labels)
        pixels, held_out = images.flatten(1), self._held_out.images.flatten(1)
        reference = _some(Images(images, labels)).images.flatten(1)
        return {
            "conditional_accuracy": (self.read(images) == labels).double(),
            "diversity_ratio": _apart(pixels, labels) / self._own_diversity,
            "novelty_ratio": self._nearest(pixels) / self._own_novelty,
            "precision": _within_manifold(pixels, held_out),
            "recall": _within_manifold(held_out, reference),
        }

    def check(self, labels: Int[Tensor, " B"]) -> None:
        """Refuse what cannot be measured, before anything is trained or drawn.

        Args:
            labels: (B,), the class that each sample will be asked to show.

        Raises:
            ConfigError: a class has fewer than two samples.
            DataError: the split's own images are alike, so that nothing can be scaled by them.
        """
        classes = self.split.classes
        counts = labels.bincount(minlength=len(classes)).tolist()
        few = [
            f"{count} of {name!r}" for name, count in zip(classes, counts, strict=True) if count < 2
        ]
        if few:
            raise ConfigError(
                "every class needs at least 2 samples, which are compared with each other; got "
                f"{listed(few)}; set sampling.samples to at least {2 * len(classes)}, twice the "
                "number of classes"
            )
        same = _SAME * math.sqrt(math.prod(self.split.shape))
        if self._own_diversity <= same:
            raise DataError(
                "diversity is scaled by how far the held-out images of a class are apart; got "
                "the same image again and again in every class; remove doubles from the data"
            )
        if self._own_novelty <= same:
            raise DataError(
                "novelty is scaled by how far held-out images are from the nearest training "
                "image; got most of them in both; remove doubles from the data"
            )

    @property
    def ceiling(self) -> float:
        """Share of held-out images that the classifier reads as their label."""
        return self.accuracy(self._held_out.images, self._held_out.labels)

    def accuracy(self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"]) -> float:
        """Share of images that the classifier reads as their label."""
        return float((self.read(images) == labels).double().mean())

    def read(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, " B"]:
        """The class that the classifier sees in each image, (B,).

        Raises:
            DivergedError: an image is of values that are no numbers.
        """
        lost = len(images) - int(images.flatten(1).isfinite().all(1).sum())
        if lost:
            raise DivergedError(
                f"{lost} of {len(images)} images hold values that are no numbers, so nothing can "
                "be read in them; a smaller training.learning_rate or sampling.guidance may help"
            )
        return torch.from_numpy(self._classifier.predict(_features(images)))

    @cached_property
    def _train(self) -> Images:
        return _some(self.split.train)

    @cached_property
    def _held_out(self) -> Images:
        return _some(self.split.held_out)

    @cached_property
    def _classifier(self) -> Any:
        from sklearn.svm import SVC

        gamma = _GAMMA_TIMES_VALUES / math.prod(self.split.shape)
        return SVC(gamma=gamma).fit(_features(self._train.images), self._train.labels.numpy())

    @cached_property
    def _own_diversity(self) -> float:
        return diversity(self._held_out.images.flatten(1), self._held_out.labels)

    @cached_property
    def _own_novelty(self) -> float:
        return float(self._nearest(self._held_out.images.flatten(1)).median())

    def _nearest(self, pixels: Tensor) -> Tensor:
        """L2 from each image (B, P) to the nearest training image, (B,)."""
        reference = self._train.images.flatten(1)
        return _by_rows(pixels, lambda rows: torch.cdist(rows, reference).amin(1).double())


def diversity(pixels: Float[Tensor, "B P"], labels: Int[Tensor, " B"]) -> float:
    """Mean L2 distance between two different images of a class, averaged over the classes.

    Args:
        pixels: (B, P), at least two of each class that occurs.
        labels: (B,).
    """
    return float(_apart(pixels, labels).mean())


def _apart(pixels: Tensor, labels: Tensor) -> Tensor:
    """Mean L2 from each image (B, P) to the others of its class, (B,).

    Weighted by (B / classes) / (images of its class), so that the mean over the images is the mean
    over the classes; 1 where all classes have as many.
    """
    values = torch.empty(len(labels), dtype=torch.float64)
    classes = labels.bincount().nonzero()
    for label in classes:
        chosen = labels == label
        count = int(chosen.sum())
        weight = len(labels) / (len(classes) * count)
        values[chosen] = _distance_sums(pixels[chosen]) * weight / (count - 1)
    return values


def _distance_sums(points: Tensor) -> Tensor:
    """L2 from each point (B, P) to all others, added up, (B,)."""
    return _by_rows(points, lambda rows: torch.cdist(rows, points).sum(1, dtype=torch.float64))


def _within_manifold(points: Tensor, reference: Tensor) -> Tensor:
    """1 where a point (B, P) is closer to some reference than its k-th neighbour is, else 0."""
    radii = torch.cdist(reference, reference).kthvalue(NEIGHBOURS + 1, dim=1).values
    return _by_rows(points, lambda rows: (torch.cdist(rows, reference) <= radii).any(1).double())


def _by_rows(points: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Measure a part of the points at a time, for all their distances would take much memory."""
    return torch.cat([measure(rows) for rows in torch.split(points, _ROWS)])


def _some(images: Images) -> Images:
    """At most `LIMIT` images, always the same: the classes in turn, two images at a time.

    Two, so that each class that occurs has a diversity.
    """
    if len(images) <= LIMIT:
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SEED))
    labels, by_class = images.labels[order].sort(stable=True)
    counts = labels.bincount()
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels]
    turn = (rank // 2).argsort(stable=True)[:LIMIT]
    chosen = order[by_class[turn]].sort().values
    return Images(images.images[chosen], images.labels[chosen])


def _features(images: Tensor) -> Any:
    """What the classifier reads: every value of an image (B, C, H, W), from 0 to 1."""
    return ((images.flatten(1) + 1) / 2).numpy()
