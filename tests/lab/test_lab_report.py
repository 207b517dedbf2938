"""The pictures are drawn from whatever a run leaves, also from a very short one."""

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch

from condmod_lab import report


@pytest.mark.parametrize("lines", [1, 2, 100])
def test_the_loss_is_drawn_from_any_number_of_lines(tmp_path: Path, lines: int) -> None:
    log = tmp_path / "metrics.jsonl"
    logged = [{"step": n, "loss": 1 / n} for n in range(1, lines + 1)]
    log.write_text("".join(json.dumps(line) + "\n" for line in logged))
    report.draw_loss(tmp_path / "loss.png", log)
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (630, 1200)
    assert (picture[..., :3].min(-1) < 0.5).sum() > 1000  # something is drawn


def test_samples_stand_left_and_real_digits_right_row_by_row(tmp_path: Path) -> None:
    ink, paper = torch.ones(14, 1, 8, 8), -torch.ones(14, 1, 8, 8)
    samples = [ink if label % 2 else paper for label in range(10)]
    report.draw_samples(tmp_path / "samples.png", samples, [paper] * 10, "a caption")
    grey = matplotlib.image.imread(tmp_path / "samples.png")[..., :3].mean(-1)
    left, right = grey[:, 100 : int(grey.shape[1] * 0.64)], grey[:, int(grey.shape[1] * 0.7) :]
    black = (left < 0.1).mean(1) > 0.5
    assert (black[1:] & ~black[:-1]).sum() == 5  # five rows of ink
    assert (right[90:] < 0.1).sum() == 0


@pytest.mark.parametrize("count", [1, 10, 23])
def test_a_grid_is_drawn_of_any_number_of_digits(tmp_path: Path, count: int) -> None:
    report.draw_grid(tmp_path / "grid.png", torch.ones(count, 1, 8, 8), "3, drawn by demo")
    picture = matplotlib.image.imread(tmp_path / "grid.png")
    assert (picture[..., :3].max(-1) < 0.1).mean() > 0.05
