"""The loop: the same by seed, by process count and after a stop; halted by NaN and by signals."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from safetensors.torch import load_file

from condmod import CheckpointError, CondmodError
from condmod.serialization import save_checkpoint
from condmod_lab import flow, journal
from condmod_lab.config import TrainConfig
from condmod_lab.data import Images, Split, load_digits
from condmod_lab.errors import ConfigError, DivergedError, RunFolderError, RunFolderExistsError
from condmod_lab.launch import make_accelerator
from condmod_lab.network import Network, build
from condmod_lab.order import Order
from condmod_lab.run_folder import Into, RunFolder
from condmod_lab.training import train
from condmod_lab.workflow import draw_images, run

Tiny = Callable[..., TrainConfig]


def start(
    config: TrainConfig, console: Console, split: Split | None = None, into: Into = "new"
) -> RunFolder:
    folder, config = RunFolder(Path(config.output)), config.resolve(10)
    accelerator = make_accelerator(config, folder.path)
    train(config, split or load_digits(), folder, accelerator, console, into=into)
    accelerator.end_training()
    return folder


def losses(folder: RunFolder) -> list[float]:
    return [line["loss"] for line in journal.read(folder.log)]


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.checkpoint / "tensors.safetensors")


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
    drawn = [
        draw_images(run.net, labels, (1, 8, 8), run.config.sampling, seed=3) for run in (one, two)
    ]
    assert torch.equal(*drawn)


def test_training_lowers_the_loss(tiny: Tiny, console: Console) -> None:
    history = losses(start(tiny("training.steps=40", "training.batch=64"), console))
    assert history[-1] < 0.8 * history[0]


@pytest.mark.parametrize("backbone", ["conv", "transformer"])
def test_a_trunk_that_all_places_share_is_trained_kept_and_counted_once(
    tiny: Tiny, console: Console, backbone: str
) -> None:
    small = {"name": backbone, "channels": 8, "blocks": 2, "condition_dim": 8}
    config = tiny(backbone=small, modulator="adaln_single")
    metrics = run(config, console)
    kept = weights(RunFolder(Path(config.output)))
    trunk = {"average.body.bank.shared.proj.weight", "average.body.bank.shared.proj.bias"}
    place = "/modulator" if backbone == "conv" else ""
    own = {f"average.body.bank.modulators.blocks/{block}{place}.table" for block in (0, 1)}
    assert {name for name in kept if ".bank." in name} == trunk | own
    assert metrics["parameters"] == sum(value.numel() for value in kept.values())
    torch.manual_seed(config.seed)
    start = build(config, 10, (1, 8, 8)).state_dict()
    for name in trunk | own:
        assert not torch.equal(kept[name], start[name.removeprefix("average.")])


def poisoned(config: TrainConfig, step: int) -> Split:
    """The digits, one of those that a step sees turned into NaN, as a broken file would give."""
    split = load_digits()
    order = Order(config.seed, len(split.train), config.training.batch, split.shape, 0.0)
    images = split.train.images.clone()
    images[order.at(step - 1).places[0]] = math.nan
    return replace(split, train=Images(images, split.train.labels))


def test_a_loss_that_is_nan_stops_at_its_step_and_keeps_the_last_good_checkpoint(
    tiny: Tiny, console: Console
) -> None:
    config = tiny("training.steps=9")
    with pytest.raises(DivergedError) as caught:
        start(config, console, poisoned(config, step=5))
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
        start(config, console, poisoned(config, step=1))
    assert not RunFolder(Path(config.output)).checkpoint.exists()


def interrupt_in_step(step: int, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Send Ctrl-C in the middle of a step."""
    steps = []

    def errors(*args: Any) -> torch.Tensor:
        steps.append(None)
        if len(steps) == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return flow.flow_errors(*args)

    monkeypatch.setattr("condmod_lab.training.flow_errors", errors)


def test_ctrl_c_ends_its_step_writes_a_checkpoint_says_so_and_goes_on_its_way(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("training.checkpoint_every=100")
    interrupt_in_step(4, monkeypatch)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        start(config, console)
    folder = RunFolder(Path(config.output))
    assert folder.load().step == 4
    assert (
        f"interrupted: the checkpoint of step 4 is in {folder.checkpoint}; "
        "go on from there with --resume\n"
    ) in console.file.getvalue()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_does_not_wait_for_the_step(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("training.checkpoint_every=100")
    interrupt_in_step(4, monkeypatch, times=2)
    with pytest.raises(KeyboardInterrupt):
        start(config, console)
    assert not RunFolder(Path(config.output)).checkpoint.exists()


@pytest.mark.parametrize("stopped_in", [1, 3, 5, 8])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["training.precision=bf16"],
        ["training.precision=fp16"],
        ["training.accumulate=2"],
        ["encoder=fuse(inputs={'time': timestep, 'label': label(classes=10, nullable=True, "
         "drop=0.5)})"],
    ],
    ids=["plain", "bf16", "fp16", "accumulated", "an encoder that draws"],
)  # fmt: skip
def test_a_run_that_goes_on_is_the_run_that_never_stopped_bit_for_bit(
    tiny: Tiny,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stopped_in: int,
    options: list[str],
) -> None:
    """Losses, norms, rates, averaged weights: data order, draws, optimiser and EMA are all back."""
    options = [*options, "training.steps=9"]
    whole = start(tiny(*options, output=str(tmp_path / "whole")), console)
    config = tiny(*options, output=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        parts = config.training.accumulate
        interrupt_in_step(stopped_in * parts, patch)
        with pytest.raises(KeyboardInterrupt):
            start(config, console)
    torch.randn(3)  # whatever happened in between
    resumed = start(config, console, into="resume")
    assert f"from step {stopped_in} in " in console.file.getvalue()
    one, two = journal.read(whole.log), journal.read(resumed.log)
    assert [{**line, "seconds": 0} for line in one] == [{**line, "seconds": 0} for line in two]
    assert weights(whole).keys() == weights(resumed).keys()
    assert all(value.equal(weights(resumed)[name]) for name, value in weights(whole).items())


def test_lines_after_the_checkpoint_are_written_again_not_twice(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill leaves a journal that is ahead of the last checkpoint, and maybe a torn line."""
    config = tiny("training.steps=9")
    interrupt_in_step(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        start(config, console)
    folder = RunFolder(Path(config.output))
    with folder.log.open("a") as log:
        log.write('{"step": 4, "loss": 7.0, "seconds": 1.0}\n{"step": 6, "lo')
    start(config, console, into="resume")
    assert [line["step"] for line in journal.read(folder.log)] == [2, 4, 6, 8, 9]
    assert 7.0 not in losses(folder)


def test_lines_before_the_first_checkpoint_are_written_again_not_twice(
    tiny: Tiny, console: Console
) -> None:
    config = tiny("training.steps=9")
    folder = RunFolder(Path(config.output))
    folder.claim(config.resolve(10), "new")
    folder.log.write_text('{"step": 2, "loss": 7.0, "seconds": 1.0}\n')
    start(config, console, into="resume")
    assert [line["step"] for line in journal.read(folder.log)] == [2, 4, 6, 8, 9]


def test_ctrl_c_in_the_last_save_is_not_lost(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunFolder.save

    def interrupted(self: RunFolder, *rest: Any) -> None:
        if rest[3] == 6:
            signal.raise_signal(signal.SIGINT)
        save(self, *rest)

    monkeypatch.setattr(RunFolder, "save", interrupted)
    config = tiny()
    with pytest.raises(KeyboardInterrupt):
        start(config, console)
    assert RunFolder(Path(config.output)).load().step == 6


def test_a_run_that_never_came_to_a_checkpoint_begins_again(tiny: Tiny, console: Console) -> None:
    config = tiny()
    RunFolder(Path(config.output)).claim(config.resolve(10), "new")
    folder = start(config, console, into="resume")
    assert folder.load().step == 6


def test_resume_begins_where_there_is_nothing_yet(tiny: Tiny, console: Console) -> None:
    assert start(tiny(), console, into="resume").load().step == 6


def test_a_checkpoint_of_another_config_is_refused_with_the_difference(
    tiny: Tiny, console: Console
) -> None:
    folder = start(tiny(), console)
    other = tiny("training.batch=32", modulator="film(scale='one_plus')")
    with pytest.raises(RunFolderError) as caught:
        start(other, console, into="resume")
    assert str(caught.value) == (
        f"{folder.path} holds a run of another config, so it cannot go on with this one; it has\n"
        "  modulator.name: dense_film, not film\n"
        "  modulator.activation: nothing, not silu\n"
        "  training.batch: 16, not 32\n"
        "  modulator.residual: False, not nothing\n"
        "give the same config, add --overwrite to replace the run, or name another folder with "
        "--output"
    )
    (folder.path / "config.yaml").write_text(other.resolve(10).to_yaml())
    with pytest.raises(RunFolderError, match=r"training\.batch: 16, not 32"):
        start(other, console, into="resume")


@pytest.mark.parametrize("lost", ["model.body.exit.weight", "optimizer.exp_avg.body.exit.weight"])
def test_a_checkpoint_that_lacks_a_part_cannot_go_on(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    config = tiny()
    interrupt_in_step(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        start(config, console)
    folder = RunFolder(Path(config.output))
    document = json.loads((folder.checkpoint / "checkpoint.json").read_text())
    kept = {name: value for name, value in weights(folder).items() if name != lost}
    assert len(kept) == len(weights(folder)) - 1
    save_checkpoint(folder.checkpoint, kept, document)
    with pytest.raises(CheckpointError, match=r"exit\.weight.*trained anew with --overwrite"):
        start(config, console, into="resume")
    save_checkpoint(folder.checkpoint, weights(folder), {**document, "training": {}})
    with pytest.raises(CheckpointError):
        start(config, console, into="resume")


def test_a_run_on_other_images_cannot_go_on(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, split = tiny(), load_digits()
    interrupt_in_step(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        start(config, console)
    other = replace(split, train=Images(split.train.images * 0.99, split.train.labels))
    with pytest.raises(RunFolderError) as caught:
        start(config, console, other, into="resume")
    assert str(caught.value) == (
        f"{config.output} holds a run on other images or labels than the config's data now has, "
        "so it cannot go on; put them back, add --overwrite to replace the run, or name another "
        "folder with --output"
    )


def test_a_finished_checkpoint_holds_no_more_than_sampling_needs(
    tiny: Tiny, console: Console
) -> None:
    folder = start(tiny(), console)
    assert all(name.startswith("average.") for name in weights(folder))


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_a_batch_in_parts_is_the_same_batch(
    tiny: Tiny, console: Console, tmp_path: Path, parts: int
) -> None:
    whole = start(tiny(output=str(tmp_path / "whole")), console)
    split = start(tiny(f"training.accumulate={parts}", output=str(tmp_path / "parts")), console)
    assert losses(split) == pytest.approx(losses(whole), abs=1e-5)


def test_bf16_trains_close_to_fp32_and_keeps_its_weights_in_fp32(
    tiny: Tiny, console: Console, tmp_path: Path
) -> None:
    full = start(tiny(output=str(tmp_path / "fp32")), console)
    half = start(tiny("training.precision=bf16", output=str(tmp_path / "bf16")), console)
    assert losses(half) == pytest.approx(losses(full), rel=0.02)
    assert losses(half) != losses(full)
    assert {value.dtype for value in weights(half).values() if value.is_floating_point()} == {
        torch.float32
    }


def test_the_average_is_what_samples_are_drawn_with_and_lags_behind(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With w the weights after each step, a_n = d·a_(n-1) + (1 - d)·w_n, d from 2/11 up."""
    config = tiny("training.checkpoint_every=1", "training.steps=9")
    seen = []
    save = RunFolder.save

    def kept(self: RunFolder, tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        seen.append({name: value.clone() for name, value in tensors.items()})
        save(self, tensors, *rest)

    monkeypatch.setattr(RunFolder, "save", kept)
    folder = start(config, console)
    name = "body.exit.weight"
    expected = seen[0][f"model.{name}"]
    for number, tensors in enumerate(seen[1:-1], start=1):
        decay = min(0.995, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * tensors[f"model.{name}"]
        assert torch.allclose(tensors[f"average.{name}"], expected, atol=1e-6)
    assert torch.equal(folder.load().net.state_dict()[name], weights(folder)[f"average.{name}"])


def test_withheld_labels_are_a_share_and_the_encoders_presence(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = []
    forward = Network.forward

    def noted(self: Network, *args: torch.Tensor) -> torch.Tensor:
        present.append(args[3])
        return forward(self, *args)

    monkeypatch.setattr(Network, "forward", noted)
    start(tiny("training.label_drop=0.25", "training.steps=40"), console)
    share = 1 - torch.cat(present[1:]).double().mean()  # the first is the trial before training
    assert share == pytest.approx(0.25, abs=0.05)


def test_a_full_disk_stops_with_a_clear_line_and_the_run_goes_on_once_there_is_room(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real limit on what this process may write, which the second checkpoint exceeds."""
    resource = pytest.importorskip("resource")
    whole = start(tiny("training.steps=9", output=str(tmp_path / "whole")), console)
    config = tiny("training.steps=9")
    folder = RunFolder(Path(config.output))
    saves = []

    def save(path: Path, *rest: Any) -> None:
        saves.append(None)
        if len(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save_checkpoint(path, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr("condmod_lab.run_folder.save_checkpoint", save)
        with pytest.raises(RunFolderError) as caught:
            start(config, console)
    text = str(caught.value)
    assert text.startswith(f"cannot write {folder.checkpoint}: ")
    assert text.endswith(
        f"; the checkpoint of step 3 is kept in {folder.checkpoint}; go on with --resume"
    )
    assert "File too large" in text
    assert folder.load().step == 3
    assert losses(start(config, console, into="resume")) == losses(whole)


def test_fewer_images_than_a_batch_are_refused(tiny: Tiny, console: Console) -> None:
    split = load_digits()
    few = replace(split, train=Images(split.train.images[:15], split.train.labels[:15]))
    with pytest.raises(ConfigError) as caught:
        start(tiny(), console, few)
    assert str(caught.value) == (
        "training.batch is at most the number of images to learn from, 15; got 16"
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["training.accumulate=3"],
            "training.batch is shared out equally over processes and accumulated parts; "
            "16 images do not go into 1 x 3; 15 do",
        ),
        (
            ["training.accumulate=17"],
            "training.batch is shared out equally over processes and accumulated parts; "
            "16 images do not go into 1 x 17; 17 do",
        ),
        (
            ["trackers=[tensorbored]"],
            "trackers should be of aim, clearml, comet_ml, dvclive, mlflow, swanlab, tensorboard, "
            "trackio, wandb; got 'tensorbored'",
        ),
        (
            ["trackers=[dvclive]"],
            "the tracker 'dvclive' is not installed; install it with: pip install dvclive",
        ),
    ],
)
def test_what_the_machine_cannot_do_is_told_before_training(
    tiny: Tiny, console: Console, options: list[str], message: str
) -> None:
    config = tiny(*options)
    with pytest.raises(ConfigError) as caught:
        start(config, console)
    assert str(caught.value) == message
    assert not Path(config.output).exists()


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "2"}, {"LOCAL_RANK": "0", "WORLD_SIZE": "1"}])
def test_what_a_scheduler_left_in_the_environment_is_a_clear_error(
    tiny: Tiny, console: Console, left: dict[str, str]
) -> None:
    with mock.patch.dict(os.environ, left):
        PartialState._reset_state()
        try:
            with pytest.raises(ConfigError) as caught:
                start(tiny(), console)
        finally:
            PartialState._reset_state()
    text = " ".join(str(caught.value).split())
    assert text.startswith(
        "accelerate cannot start with training.precision fp32 and what the environment says of "
        "other processes (WORLD_SIZE, LOCAL_RANK, MASTER_ADDR): "
    )
    assert text.count("MASTER_ADDR") > 1


def test_tensorboard_shows_the_journal(tiny: Tiny, console: Console) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = start(tiny("trackers=[tensorboard]"), console)
    shown = EventAccumulator(str(folder.path / "tracking" / "condmod"))
    shown.Reload()
    for key in ("loss", "gradient_norm", "learning_rate"):
        scalars = [(event.step, event.value) for event in shown.Scalars(key)]
        logged = [(line["step"], line[key]) for line in journal.read(folder.log)]
        assert scalars == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": [  # whose --cpu starts one process, whatever their number
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
        *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
        "--main_process_port=0",
    ],
}


def launch(
    launcher: str, file: Path, *options: str, main: tuple[str, ...] = ("-m", "condmod")
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], *main, "train", str(file), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
def test_two_processes_are_one_run_from_the_same_yaml(
    tiny: Tiny, console: Console, tmp_path: Path, launcher: str
) -> None:
    """Two gloo processes meet the same images, noise and times as one, and average to its loss."""
    options = ["training.steps=12", "training.accumulate=2"]
    one = start(tiny(*options, output=str(tmp_path / "one")), console)
    file = tmp_path / "config.yaml"
    file.write_text(tiny(*options).to_yaml())
    done = launch(launcher, file)
    assert done.returncode == 0, done.stderr
    two = RunFolder(tmp_path / "run")
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    for name, value in weights(one).items():
        assert torch.allclose(value, weights(two)[name], atol=2e-3), name  # Adam divides by ~0
    assert two.load().step == 12
    assert done.stdout.count("images drawn by") == 1
    assert done.stderr.count("training dense_film, 12 steps, on 2 processes in ") == 1
    assert sorted(yaml.safe_load((two.path / "config.yaml").read_text())) == sorted(
        yaml.safe_load(file.read_text())
    )


SHARDED = "training.sharding=fsdp2"
WATCHED = """
    from collections import Counter

    from torch.distributed.tensor import DTensor, Shard
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.optim.swa_utils import AveragedModel

    from condmod.cli import app
    from condmod_lab.conv import ConvBlock
    from condmod_lab.network import Network
    from condmod_lab.transformer import TransformerBlock

    seen, nets, update = Counter(), [], AveragedModel.update_parameters

    def check(what, tensors):
        seen[what] += 1
        tensors = list(tensors)
        assert tensors, what
        for tensor in tensors:
            assert isinstance(tensor, DTensor), (what, type(tensor))
            assert tensor.placements == (Shard(0),), (what, tensor.placements)
        kept = sum(tensor.to_local().numel() for tensor in tensors)
        assert 0.3 < kept / sum(tensor.numel() for tensor in tensors) < 0.7, what

    def stepped(optimizer, *_):
        learned = [value for group in optimizer.param_groups for value in group["params"]]
        check("parameters", learned)
        check("gradients", [value.grad for value in learned])
        for key in ("exp_avg", "exp_avg_sq"):
            check(key, [optimizer.state[value][key] for value in learned])

    def averaged(average, net):
        update(average, net)
        check("average", average.module.parameters())

    def entered(module, _):
        if module.training and isinstance(module, Network):
            nets[:] = [module]
        if module.training and isinstance(module, ConvBlock | TransformerBlock):
            check("bank in a block", nets[0].body.bank.parameters())
            check("other blocks", (p for b in nets[0].body.blocks if b is not module
                                   for p in b.parameters()))

    register_optimizer_step_post_hook(stepped)
    register_module_forward_pre_hook(entered)
    AveragedModel.update_parameters = averaged
    app(standalone_mode=False)
    print("seen", sorted(seen.items()))
"""


@pytest.mark.parametrize(
    ("backbone", "modulator", "precision"),
    [("transformer", "adaln(affine=True)", "fp32"), ("conv", "adaln_zero", "fp16")],
)
def test_two_processes_that_share_out_their_weights_are_one_run_from_the_same_yaml(
    tiny: Tiny, console: Console, tmp_path: Path, backbone: str, modulator: str, precision: str
) -> None:
    """FSDP2 on two gloo processes, each with a part of weights, gradients, optimiser and average.

    One process computes the batch in two parts, as the two do, so that half precision rounds alike.
    """
    fields = {"backbone": {"name": backbone, "channels": 8, "blocks": 2, "condition_dim": 8}}
    options = ["training.steps=12", f"training.precision={precision}"]
    one = start(
        tiny(*options, "training.accumulate=2", modulator=modulator, **fields,
             output=str(tmp_path / "one")),
        console,
    )  # fmt: skip
    file, script = tmp_path / "config.yaml", tmp_path / "watched.py"
    file.write_text(tiny(*options, modulator=modulator, **fields).to_yaml())
    script.write_text(textwrap.dedent(WATCHED))
    done = launch("torchrun", file, "--set", SHARDED, main=(str(script),))
    assert done.returncode == 0, done.stderr
    each_step = dict.fromkeys(["average", "exp_avg", "exp_avg_sq", "gradients", "parameters"], 12)
    seen = each_step | {"bank in a block": 24, "other blocks": 24}
    assert done.stdout.count(f"seen {sorted(seen.items())}\n") == 2, done.stdout
    assert "Warning" not in done.stderr
    two = RunFolder(tmp_path / "run")
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert weights(two).keys() == weights(one).keys()
    for name, value in weights(one).items():
        assert torch.allclose(value, weights(two)[name], atol=2e-3), name  # Adam divides by ~0
    assert two.load().step == 12
    assert done.stdout.count("images drawn by") == 1
    assert f"training {modulator}, 12 steps, sharded over 2 processes in " in done.stderr


STOPPED = """
    import signal

    import torch.distributed as dist

    from condmod.cli import main
    from condmod_lab import flow, training

    steps = []

    def errors(*args):
        steps.append(None)
        if len(steps) == 5 and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return flow.flow_errors(*args)

    training.flow_errors = errors
    main()
"""


def test_a_sharded_run_stops_with_a_whole_checkpoint_and_goes_on_with_one_process(
    tiny: Tiny, console: Console, tmp_path: Path
) -> None:
    options = ["training.steps=12", "training.checkpoint_every=100"]
    whole = start(tiny(*options, output=str(tmp_path / "whole")), console)
    file, script = tmp_path / "config.yaml", tmp_path / "stopped.py"
    file.write_text(tiny(*options, SHARDED).to_yaml())
    script.write_text(textwrap.dedent(STOPPED))
    done = launch("torchrun", file, main=(str(script),))
    folder = RunFolder(tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("interrupted: the checkpoint of step 5 is in ") == 1
    found = weights(folder)
    names = {name.removeprefix("average.") for name in found if name.startswith("average.")}
    kinds = ["average", "model", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step"]
    assert found.keys() == {f"{kind}.{name}" for name in names for kind in kinds}
    resumed = start(tiny(*options), console, into="resume")
    assert "from step 5 in " in console.file.getvalue()
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_a_run_of_one_process_goes_on_with_two(
    tiny: Tiny,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    sharding: str,
) -> None:
    whole = start(tiny("training.steps=12", output=str(tmp_path / "whole")), console)
    config = tiny("training.steps=12")
    interrupt_in_step(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        start(config, console)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    done = launch("torchrun", file, "--resume", "--set", f"training.sharding={sharding}")
    assert done.returncode == 0, done.stderr
    assert losses(RunFolder(tmp_path / "run")) == pytest.approx(losses(whole), abs=1e-5)


def test_one_process_has_nobody_to_share_its_weights_with(
    tiny: Tiny, console: Console, tmp_path: Path
) -> None:
    """So a file made for many processes is tried out on one, and trains the same."""
    plain = start(tiny(output=str(tmp_path / "plain")), console)
    alone = start(tiny(SHARDED, output=str(tmp_path / "alone")), console)
    assert losses(alone) == losses(plain)
    assert all(value.equal(weights(alone)[name]) for name, value in weights(plain).items())
    assert "sharded" not in console.file.getvalue()


def test_accelerates_own_sharding_is_refused(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError) as caught:
        start(tiny(), console)
    assert str(caught.value) == (
        "accelerate's own FSDP wraps networks that it does not know; launch without --use_fsdp and "
        "set training.sharding to fsdp2"
    )


def test_a_batch_that_two_processes_cannot_share_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(tiny("training.batch=15").to_yaml())
    done = launch("torchrun", file)
    assert done.returncode == 1
    assert "15 images do not go into 2 x 1; 14 do" in done.stderr
