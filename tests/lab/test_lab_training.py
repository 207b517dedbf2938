"""The loop: the same by seed, stopped by NaN and by Ctrl-C, and nothing lost either way."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from condmod import CondmodError
from condmod_lab.config import TrainConfig
from condmod_lab.data import Digits, load_digits
from condmod_lab.errors import ConfigError, DivergedError, RunFolderExistsError
from condmod_lab.run_folder import RunFolder
from condmod_lab.training import make_accelerator, train
from condmod_lab.workflow import draw_digits

Tiny = Callable[..., TrainConfig]


def start(config: TrainConfig, console: Console, digits: Digits | None = None) -> RunFolder:
    folder = RunFolder(Path(config.output))
    train(config, digits or load_digits().train, folder, make_accelerator(), console)
    return folder


def losses(folder: RunFolder) -> list[float]:
    return [json.loads(line)["loss"] for line in folder.log.read_text().splitlines()]


def test_a_run_leaves_config_checkpoint_and_a_line_every_few_steps(
    tiny: Tiny, console: Console
) -> None:
    folder = start(tiny("training.steps=7"), console)
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    assert lines[0].keys() == {"step", "loss", "gradient_norm", "learning_rate", "seconds"}
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert folder.load().step == 7
    assert sorted(entry.name for entry in folder.path.iterdir()) == [
        "checkpoint",
        "config.yaml",
        "metrics.jsonl",
    ]


def test_the_seed_decides_every_loss_every_weight_and_every_sample(
    tiny: Tiny, console: Console, tmp_path: Path
) -> None:
    first = start(tiny(output=str(tmp_path / "a")), console)
    torch.randn(5)  # whatever happened in between
    second = start(tiny(output=str(tmp_path / "b")), console)
    other = start(tiny("seed=1", output=str(tmp_path / "c")), console)
    assert losses(first) == losses(second) != losses(other)
    one, two = first.load(), second.load()
    for a, b in zip(one.net.state_dict().values(), two.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    labels = torch.arange(4)
    drawn = [draw_digits(run.net, labels, run.config.sampling, seed=3) for run in (one, two)]
    assert torch.equal(*drawn)


def test_training_lowers_the_loss(tiny: Tiny, console: Console) -> None:
    history = losses(start(tiny("training.steps=40", "training.batch=64"), console))
    assert history[-1] < 0.8 * history[0]


class PoisonedDigits(Digits):
    """Real digits, one batch of which turns into NaN, as a broken file would give."""

    def __init__(self, digits: Digits, batch: int) -> None:
        super().__init__(digits.images, digits.labels)
        object.__setattr__(self, "batches_left", [batch])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = super().__getitems__(indices)
        self.batches_left[0] -= 1
        return (images * math.nan if self.batches_left[0] == 0 else images), labels


def test_a_loss_that_is_nan_stops_at_its_step_and_keeps_the_last_good_checkpoint(
    tiny: Tiny, console: Console
) -> None:
    config = tiny("training.steps=9")
    with pytest.raises(DivergedError) as caught:
        start(config, console, PoisonedDigits(load_digits().train, batch=5))
    folder = RunFolder(Path(config.output))
    assert str(caught.value) == (
        "training stopped at step 5: the loss is nan; "
        f"the checkpoint of step 3 is kept in {folder.checkpoint}; "
        "a smaller training.learning_rate than 0.002 may help"
    )
    assert isinstance(caught.value, ArithmeticError)
    kept = folder.load()
    assert kept.step == 3
    assert all(value.isfinite().all() for value in kept.net.state_dict().values())


def test_a_nan_before_the_first_checkpoint_says_that_there_is_none(
    tiny: Tiny, console: Console
) -> None:
    config = tiny()
    with pytest.raises(DivergedError, match=r"at step 1: .*; no checkpoint was written yet"):
        start(config, console, PoisonedDigits(load_digits().train, batch=1))
    assert not RunFolder(Path(config.output)).checkpoint.exists()


class InterruptedDigits(Digits):
    """Real digits; whoever reads the fifth batch hears Ctrl-C."""

    def __init__(self, digits: Digits) -> None:
        super().__init__(digits.images, digits.labels)
        object.__setattr__(self, "batches", [])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        self.batches.append(indices)
        if len(self.batches) == 5:
            raise KeyboardInterrupt
        return super().__getitems__(indices)


def test_ctrl_c_writes_a_checkpoint_says_so_and_goes_on_its_way(
    tiny: Tiny, console: Console
) -> None:
    config = tiny("training.checkpoint_every=100")
    with pytest.raises(KeyboardInterrupt):
        start(config, console, InterruptedDigits(load_digits().train))
    folder = RunFolder(Path(config.output))
    step = folder.load().step
    assert 1 <= step <= 4
    assert f"interrupted: the checkpoint of step {step} is in {folder.checkpoint}\n" in (
        console.file.getvalue()
    )


def test_fewer_digits_than_a_batch_are_refused(tiny: Tiny, console: Console) -> None:
    digits = load_digits().train
    few = Digits(digits.images[:15], digits.labels[:15])
    with pytest.raises(ConfigError) as caught:
        start(tiny(), console, few)
    assert str(caught.value) == (
        "training.batch is at most the number of digits to learn from, 15; got 16"
    )


def test_a_config_that_does_not_fit_touches_no_folder(tiny: Tiny, console: Console) -> None:
    config = tiny(modulator="per_timestep(inner=film, encoder=timestep)")
    with pytest.raises(CondmodError):
        start(config, console)
    assert not Path(config.output).exists()


def test_a_run_folder_that_exists_is_refused_before_training(tiny: Tiny, console: Console) -> None:
    config = tiny("training.steps=1")
    folder = start(config, console)
    before = folder.log.read_text()
    with pytest.raises(RunFolderExistsError):
        start(config, console)
    assert folder.log.read_text() == before


def test_without_a_terminal_progress_is_plain_lines(tiny: Tiny, console: Console) -> None:
    start(tiny("training.steps=20"), console)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("training dense_film, 20 steps, in ")
    assert lines[-1].startswith("step 20/20  loss ")
    assert lines[-1].endswith("0:00 left")
    assert "steps/s" in lines[1]
    assert "\x1b" not in console.file.getvalue()


def test_on_a_terminal_progress_is_a_bar_with_loss_rate_and_time_left(tiny: Tiny) -> None:
    from io import StringIO

    console = Console(file=StringIO(), force_terminal=True, width=100)
    start(tiny("training.steps=4"), console)
    shown = console.file.getvalue()
    for part in ("100%", "loss ", "steps/s", "0:00 left", "━"):
        assert part in shown


def test_two_processes_share_one_run(tiny: Tiny, tmp_path: Path) -> None:
    """The loop stands on accelerate: a launcher is all that more devices need."""
    config = tiny()
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "launched.py").write_text(
        "from pathlib import Path\n"
        "from condmod_lab import commands\n"
        f"commands.train(Path({str(tmp_path / 'config.yaml')!r}))\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            str(tmp_path / "launched.py"),
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    folder = RunFolder(Path(config.output))
    assert len(losses(folder)) == 3
    assert folder.load().step == 6
    assert done.stdout.count("digits drawn by") == 1
