"""The pictures are drawn from whatever a run leaves, also from a very short one."""

from pathlib import Path

import matplotlib.image
import pytest
import torch

from condmod_lab import report
from condmod_lab.data import Images, Split


@pytest.mark.parametrize("lines", [1, 2, 100])
def test_the_loss_is_drawn_from_any_number_of_lines(tmp_path: Path, lines: int) -> None:
    logged = [{"step": n, "loss": 1 / n} for n in range(1, lines + 1)]
    report.draw_loss(tmp_path / "loss.png", logged)
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (630, 1200)
    assert (picture[..., :3].min(-1) < 0.5).sum() > 1000  # something is drawn


def split_of(real: torch.Tensor, classes: int, *, ink: bool) -> Split:
    images = Images(real, torch.arange(len(real)) % classes)
    return Split(images, images, tuple(f"class {n}" for n in range(classes)), ink=ink)


def test_samples_stand_left_and_real_images_right_row_by_row(tmp_path: Path) -> None:
    labels = torch.arange(140) % 10
    samples = (labels % 2 * 2.0 - 1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    real = split_of(-torch.ones(140, 1, 8, 8), 10, ink=True)
    report.draw_samples(tmp_path / "samples.png", samples, labels, real, "a caption")
    grey = matplotlib.image.imread(tmp_path / "samples.png")[..., :3].mean(-1)
    left, right = grey[:, 200 : int(grey.shape[1] * 0.64)], grey[:, int(grey.shape[1] * 0.72) :]
    black = (left < 0.1).mean(1) > 0.5
    assert (black[1:] & ~black[:-1]).sum() == 5  # five rows of ink
    assert (right[90:] < 0.1).sum() == 0


@pytest.mark.parametrize("classes", [2, 3, 40])
def test_pictures_of_any_classes_in_colour_are_drawn(tmp_path: Path, classes: int) -> None:
    red = torch.stack([torch.ones(120, 16, 16), *-torch.ones(2, 120, 16, 16)], dim=1)
    split = split_of(red, classes, ink=False)
    report.draw_samples(tmp_path / "samples.png", red, split.train.labels, split, "a caption")
    picture = matplotlib.image.imread(tmp_path / "samples.png")[..., :3]
    assert ((picture[..., 0] > 0.9) & (picture[..., 1] < 0.1)).mean() > 0.1


@pytest.mark.parametrize("ink", [True, False])
@pytest.mark.parametrize("count", [1, 10, 23])
def test_a_grid_is_drawn_of_any_number_of_images(tmp_path: Path, count: int, ink: bool) -> None:
    images = torch.full((count, 1, 8, 8), 1.0 if ink else -1.0)
    report.draw_grid(tmp_path / "grid.png", images, "3, drawn by demo", ink=ink)
    picture = matplotlib.image.imread(tmp_path / "grid.png")
    assert (picture[..., :3].max(-1) < 0.1).mean() > 0.05
