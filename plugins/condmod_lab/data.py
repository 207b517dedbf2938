"""The data: 1,797 real handwritten digits of 8x8 pixels, with a stratified quarter held out."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

CLASSES: Final = 10
SIDE: Final = 8
_BRIGHTEST = 16.0
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Images with their labels.

    Attributes:
        images: (B, 1, 8, 8), from -1 (paper) to 1 (ink).
        labels: (B,), from 0 to 9.
    """

    images: Float[Tensor, "B 1 8 8"]
    labels: Int[Tensor, " B"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once, which a DataLoader without collation hands on as it is."""
        chosen = torch.tensor(indices)
        return self.images[chosen], self.labels[chosen]

    def of_class(self, label: int) -> Tensor:
        """The images of one class, (B, 1, 8, 8)."""
        return self.images[self.labels == label]


@dataclass(frozen=True, slots=True)
class Split:
    """The digits that a network may learn from, and those that nothing is ever fitted on."""

    train: Digits
    held_out: Digits


@cache
def load_digits() -> Split:
    """The digits that scikit-learn ships, split 3:1 by class; always the same split."""
    from sklearn.datasets import load_digits as shipped
    from sklearn.model_selection import train_test_split

    bunch = shipped()
    parts = train_test_split(
        bunch.images,
        bunch.target,
        test_size=0.25,
        random_state=_SPLIT_SEED,
        stratify=bunch.target,
    )
    train_images, held_out_images, train_labels, held_out_labels = parts
    return Split(_digits(train_images, train_labels), _digits(held_out_images, held_out_labels))


def _digits(images: Any, labels: Any) -> Digits:
    scaled = torch.from_numpy(images).float()[:, None] * (2 / _BRIGHTEST) - 1
    return Digits(scaled, torch.from_numpy(labels).long())
