"""A split holds out a quarter of every class, always the same one, and refuses too little data."""

from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits as shipped
from sklearn.model_selection import train_test_split

from condmod_lab.data import Images, Split, listed, load_data, load_digits, split
from condmod_lab.errors import DataError
from condmod_lab.sections import CsvConfig, DigitsConfig, FolderConfig


def test_the_digits_hold_out_a_quarter_of_every_class_and_share_nothing() -> None:
    digits = load_digits()
    assert (len(digits.train), len(digits.held_out)) == (1347, 450)
    assert digits.train.images.shape == (1347, 1, 8, 8)
    assert (digits.train.images.min(), digits.train.images.max()) == (-1, 1)
    whole = torch.cat([digits.train.labels, digits.held_out.labels]).bincount()
    quarter = digits.held_out.labels.bincount() / whole
    assert (quarter - 0.25).abs().max() < 0.01
    apart = torch.cdist(digits.held_out.images.flatten(1), digits.train.images.flatten(1))
    assert apart.min() > 0


def test_the_digits_are_split_as_scikit_learn_splits_them() -> None:
    bunch = shipped()
    parts = train_test_split(
        bunch.images, bunch.target, test_size=0.25, random_state=0, stratify=bunch.target
    )
    train, held_out, train_labels, held_out_labels = map(torch.from_numpy, parts)
    digits = load_data(DigitsConfig())
    assert torch.equal(digits.train.images[:, 0], train.float() / 8 - 1)
    assert torch.equal(digits.held_out.images[:, 0], held_out.float() / 8 - 1)
    assert torch.equal(digits.train.labels, train_labels)
    assert torch.equal(digits.held_out.labels, held_out_labels)


def test_the_digits_are_ink_on_paper_and_other_images_are_light() -> None:
    digits = load_digits()
    assert (digits.ink, digits.shape, digits.classes) == (True, (1, 8, 8), tuple("0123456789"))
    assert digits.skipped == ()
    assert not _split([8, 8]).ink


@given(st.lists(st.integers(8, 40), min_size=2, max_size=12))
def test_every_class_has_a_quarter_held_out_and_at_least_two(counts: list[int]) -> None:
    found = _split(counts)
    held_out = found.held_out.labels.bincount(minlength=len(counts))
    assert held_out.min() >= 2
    assert (held_out - torch.tensor(counts) / 4).abs().max() <= 1
    assert torch.equal(
        torch.cat([found.train.images, found.held_out.images]).flatten().sort().values,
        torch.arange(sum(counts), dtype=torch.float32),
    )


def test_images_keep_their_labels_and_the_same_images_give_the_same_split() -> None:
    first, second = _split([9, 12, 30]), _split([9, 12, 30])
    for part in (first.train, first.held_out):
        assert torch.equal(part.labels, torch.bucketize(part.images.flatten(), _ends([9, 12, 30])))
    assert torch.equal(first.held_out.images, second.held_out.images)
    assert torch.equal(first.train.of_class(1), first.train.images[first.train.labels == 1])


def test_one_class_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        _split([20])
    assert str(caught.value) == (
        "a label says which of at least 2 classes an image is of; got 1: 'class 0'; "
        "add the images of another class"
    )
    assert isinstance(caught.value, ValueError)


def test_classes_with_fewer_than_eight_images_are_refused_by_name_and_count() -> None:
    with pytest.raises(DataError) as caught:
        _split([8, 7, 30, 0])
    assert str(caught.value) == (
        "every class needs at least 8 images, for a quarter is held out and compared with itself; "
        "got 'class 1' with 7, 'class 3' with 0; add images to these classes or leave them out"
    )


def test_where_every_image_is_a_class_of_its_own_eight_are_named() -> None:
    with pytest.raises(DataError, match=r"'class 7' with 1 and 92 more; add images"):
        _split([1] * 100)


@given(st.lists(st.text("abc", min_size=1), max_size=20))
def test_a_list_in_an_error_names_eight_and_counts_the_others(items: list[str]) -> None:
    text = listed(items)
    if len(items) <= 8:
        assert text == ", ".join(items)
    else:
        assert text == f"{', '.join(items[:8])} and {len(items) - 8} more"


@pytest.mark.parametrize("color", [False, True])
def test_a_folder_of_pictures_is_split_and_tells_what_was_skipped(
    tmp_path: Path, color: bool
) -> None:
    _draw(tmp_path, "cat", 10)
    _draw(tmp_path, "dog", 8)
    (tmp_path / "dog" / "broken.png").write_bytes(b"no picture")
    found = load_data(
        FolderConfig(name="folder", path=str(tmp_path), size=6, color=color, skip_broken=True)
    )
    assert (len(found.train), len(found.held_out)) == (13, 5)
    assert found.shape == (3 if color else 1, 6, 6)
    assert found.classes == ("cat", "dog")
    assert found.skipped == (f"{Path('dog', 'broken.png')} (not a picture that Pillow can read)",)


def test_a_csv_of_pictures_gives_the_split_that_their_folder_gives(tmp_path: Path) -> None:
    names = [*_draw(tmp_path, "cat", 9), *_draw(tmp_path, "dog", 8)]
    lines = [f"{name},{name.split('/')[0]}" for name in names]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    one = load_data(CsvConfig(name="csv", path=str(tmp_path / "metadata.csv")))
    other = load_data(FolderConfig(name="folder", path=str(tmp_path)))
    assert one.classes == other.classes
    assert torch.equal(one.train.images, other.train.images)
    assert torch.equal(one.held_out.labels, other.held_out.labels)


def _split(counts: list[int]) -> Split:
    """Images of one pixel, which counts them."""
    images = torch.arange(sum(counts), dtype=torch.float32)[:, None, None, None]
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    found = split(images, labels, tuple(f"class {label}" for label in range(len(counts))))
    assert isinstance(found.train, Images)
    return found


def _ends(counts: list[int]) -> torch.Tensor:
    """The last image of every class, by its pixel."""
    return torch.tensor(counts).cumsum(0).float() - 1


def _draw(folder: Path, name: str, count: int) -> list[str]:
    """Draw pictures of noise into the folder of a class."""
    (folder / name).mkdir()
    names = [f"{name}/{place}.png" for place in range(count)]
    for file in names:
        noise = numpy.random.randint(0, 256, (9, 7, 3), dtype=numpy.uint8)
        Image.fromarray(noise).save(folder / file)
    return names
