"""The data: images with their labels, a stratified quarter of them held out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from condmod_lab.errors import DataError
from condmod_lab.sections import CsvConfig, DigitsConfig, FolderConfig

SHARE_HELD_OUT: Final = 0.25
FEWEST: Final = 8  # a quarter of them is two, which the measure of diversity compares
_BRIGHTEST: Final = 16.0
_SPLIT_SEED: Final = 0
_LISTED: Final = 8


@dataclass(frozen=True, slots=True)
class Images:
    """Images with their labels.

    Attributes:
        images: (B, C, H, W), from -1 to 1.
        labels: (B,), places in the split's classes.
    """

    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, " B"]

    def __len__(self) -> int:
        return len(self.labels)

    def of_class(self, label: int) -> Tensor:
        """The images of one class, (B, C, H, W)."""
        return self.images[self.labels == label]


@dataclass(frozen=True, slots=True)
class Split:
    """The images that a network may learn from, and those that nothing is ever fitted on.

    Attributes:
        train: three quarters of every class.
        held_out: the other quarter.
        classes: what the labels mean, in order.
        ink: whether 1 is ink on paper (digits), where it is otherwise the brightest light.
        skipped: what was left out in reading, each with its reason.
    """

    train: Images
    held_out: Images
    classes: tuple[str, ...]
    ink: bool = False
    skipped: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits that other images, labels or classes would not have."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for part in (self.train, self.held_out):
            for tensor in (part.images, part.labels):
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:8]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image: (C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def load_data(section: DigitsConfig | FolderConfig | CsvConfig) -> Split:
    """Read what a config's `data` names; the same files give the same split.

    Args:
        section: which data.

    Returns:
        The split; its `skipped` tells what was left out.

    Raises:
        DataError: there is no such data, or too little; says where and what.
    """
    if isinstance(section, DigitsConfig):
        return load_digits()
    from condmod_lab.pictures import read_csv, read_folder

    found = read_folder(section) if isinstance(section, FolderConfig) else read_csv(section)
    whole = split(found.images, found.labels, found.classes)
    return replace(whole, skipped=found.skipped)


@cache
def load_digits() -> Split:
    """The digits that scikit-learn ships; always the same split."""
    from sklearn.datasets import load_digits as shipped

    bunch = shipped()
    images = torch.from_numpy(bunch.images).float()[:, None] * (2 / _BRIGHTEST) - 1
    labels = torch.from_numpy(bunch.target).long()
    return split(images, labels, tuple("0123456789"), ink=True)


def split(
    images: Float[Tensor, "B C H W"],
    labels: Int[Tensor, " B"],
    classes: tuple[str, ...],
    *,
    ink: bool = False,
) -> Split:
    """Hold out a quarter of every class; the same images give the same split.

    Args:
        images: (B, C, H, W), from -1 to 1.
        labels: (B,), places in the classes.
        classes: what the labels mean, in order.
        ink: whether 1 is ink on paper.

    Raises:
        DataError: fewer than two classes, or a class with fewer than eight images.
    """
    from sklearn.model_selection import train_test_split

    _check(labels.bincount(minlength=len(classes)).tolist(), classes)
    places = train_test_split(
        torch.arange(len(labels)).numpy(),
        test_size=SHARE_HELD_OUT,
        random_state=_SPLIT_SEED,
        stratify=labels.numpy(),
    )
    train, held_out = (Images(images[chosen], labels[chosen]) for chosen in places)
    return Split(train, held_out, classes, ink)


def listed(items: Sequence[str]) -> str:
    """The first eight of them for an error's text, and how many more there are."""
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _check(counts: Sequence[int], classes: tuple[str, ...]) -> None:
    if len(classes) < 2:
        raise DataError(
            f"a label says which of at least 2 classes an image is of; got {len(classes)}: "
            f"{listed([repr(name) for name in classes])}; add the images of another class"
        )
    few = [
        f"{name!r} with {count}"
        for name, count in zip(classes, counts, strict=True)
        if count < FEWEST
    ]
    if few:
        raise DataError(
            f"every class needs at least {FEWEST} images, for a quarter is held out and compared "
            f"with itself; got {listed(few)}; add images to these classes or leave them out"
        )
