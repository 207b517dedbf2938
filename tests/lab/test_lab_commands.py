"""The commands as a user types them: what they write, print and exit with."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import yaml
from safetensors.torch import load_file

from condmod import CheckpointError, ConditionError
from condmod_lab import commands, journal
from condmod_lab.errors import RunFolderExistsError

FIGURES = {
    "conditional_accuracy",
    "null_accuracy",
    "classifier_accuracy",
    "held_out_loss",
    "diversity_ratio",
    "novelty_ratio",
    "precision",
    "recall",
    "num_samples",
    "train_seconds",
    "sample_seconds",
    "step_seconds",
    "parameters",
    "modulator",
}
QUICK = [
    "backbone.channels=8",
    "backbone.blocks=1",
    "training.steps=6",
    "training.batch=16",
    "sampling.samples=40",
    "sampling.steps=2",
]
CONDMOD = [sys.executable, "-c", "from condmod.cli import main; main()"]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file of a tiny run."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "modulator": "film",
                "backbone": {"channels": 8, "blocks": 1, "condition_dim": 8},
                "training": {"steps": 6, "batch": 16, "log_every": 1},
                "sampling": {"samples": 40, "steps": 2},
            }
        )
    )
    return path


@pytest.fixture(scope="module")
def run(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    commands.train(example, output=str(folder))
    return folder


def test_a_run_folder_holds_all_that_was_promised(run: Path) -> None:
    assert sorted(
        entry.name for entry in run.iterdir() if entry.name not in (".lock", "drawn")
    ) == [
        "checkpoint",
        "config.yaml",
        "loss.png",
        "measures.safetensors",
        "metrics.json",
        "metrics.jsonl",
        "samples.png",
        "samples.safetensors",
    ]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics.keys() == FIGURES
    assert metrics["num_samples"] == 40
    assert metrics["modulator"] == "film"
    samples = load_file(run / "samples.safetensors")
    assert samples["images"].shape == (40, 1, 8, 8)
    assert samples["images"].abs().max() <= 1
    assert samples["labels"].tolist() == list(range(10)) * 4
    for picture in ("samples.png", "loss.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


def test_the_resolved_config_spells_out_every_option_of_the_modulator(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["modulator"]["name"] == "film"
    assert {"scale", "init", "hidden"} <= config["modulator"].keys()
    assert config["training"]["ema"] == 0.995


def test_train_prints_figures_beside_their_goals(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.train(example, output=str(tmp_path / "run"), set_=["modulator=dense_film"])
    out, err = capsys.readouterr()
    assert re.search(r"conditional_accuracy +0\.\d+ +goal >= 0\.95 +missed", out)
    assert "conditioned by dense_film" in out
    assert f"look at {tmp_path / 'run'}/samples.png" in out
    first, second = err.splitlines()[:2]
    assert first == f"training dense_film, 6 steps, in {tmp_path / 'run'}"
    assert second.startswith("step 1/6  loss ")


def test_train_prints_json_alone_on_stdout(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.train(example, output=str(tmp_path / "run"), json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == FIGURES | {"output"}


def test_train_refuses_a_run_that_exists_and_overwrites_it_when_asked(
    example: Path, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunFolderExistsError, match="--overwrite to replace it"):
        commands.train(example, output=str(run))
    folder = tmp_path / "again"
    commands.train(example, output=str(folder), set_=["seed=1"])
    commands.train(example, output=str(folder), set_=["seed=2"], overwrite=True)
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 2


def test_demo_overwrites_its_own_run_folder_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands.demo(modulator="dense_film", set_=QUICK)
    commands.demo(modulator="film(scale='one_plus')", set_=QUICK, json=True)
    metrics = json.loads((tmp_path / "runs" / "demo" / "metrics.json").read_text())
    assert metrics["modulator"] == "film(scale='one_plus')"
    (tmp_path / "runs" / "demo").rename(tmp_path / "runs" / "kept")
    with pytest.raises(RunFolderExistsError):
        commands.demo(set_=QUICK, output="runs/kept")


def test_sample_draws_one_label_the_same_by_seed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.sample(run, label="3", count=12)
    first = load_file(run / "drawn" / "label-3.safetensors")
    assert (run / "drawn" / "label-3.png").read_bytes().startswith(b"\x89PNG")
    assert first["images"].shape == (12, 1, 8, 8)
    assert first["labels"].tolist() == [3] * 12
    assert "drew 12 images of class 3" in capsys.readouterr().out
    commands.sample(run, label="3", count=12, json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"label", "count", "picture", "tensors", "read_as_label"}
    assert load_file(printed["tensors"])["images"].equal(first["images"])
    commands.sample(run, label="3", count=12, seed=1)
    assert not load_file(printed["tensors"])["images"].equal(first["images"])
    commands.sample(run, label="3", count=12, guidance=4.0)
    assert not load_file(printed["tensors"])["images"].equal(first["images"])


@pytest.mark.parametrize("label", ["-1", "10", "three"])
def test_sample_refuses_a_label_that_is_no_class(run: Path, label: str) -> None:
    with pytest.raises(ConditionError) as caught:
        commands.sample(run, label=label)
    assert str(caught.value) == f"a label is from 0 to 9; got {label}"


def test_sample_from_a_folder_without_a_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no condmod checkpoint"):
        commands.sample(tmp_path, label="3")


def test_help_shows_an_example_and_imports_no_torch() -> None:
    for command, example in {
        "demo": 'condmod demo --modulator "dense_film"',
        "train": "condmod train examples/digits.yaml --set modulator=film",
        "sample": "condmod sample runs/demo --label 3",
    }.items():
        code = f"import sys; sys.argv = ['condmod', '{command}', '--help']\n" + (
            "from condmod.cli import main\n"
            "try:\n    main()\n"
            "finally:\n    assert 'torch' not in sys.modules, 'torch was imported'\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert example in done.stdout


def test_a_users_error_is_one_clear_line_and_exit_1(run: Path) -> None:
    done = subprocess.run(
        [*CONDMOD, "sample", str(run), "--label", "12"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "a label is from 0 to 9; got 12" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "status"), [("SIGINT", 130), ("SIGTERM", -signal.SIGTERM), ("SIGHUP", -signal.SIGHUP)]
)
def test_a_signal_in_the_middle_of_training_leaves_a_checkpoint_that_goes_on(
    example: Path, tmp_path: Path, name: str, status: int
) -> None:
    folder = tmp_path / "run"
    command = [*CONDMOD, "train", str(example), f"--output={folder}", "--set=training.steps=2000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            _wait_for_a_line(folder / "metrics.jsonl", process)
            process.send_signal(getattr(signal, name))
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == status
    found = re.search(r"interrupted: the checkpoint of step (\d+) is in .*; go on .*--resume", err)
    assert found, err
    assert "Traceback" not in err
    assert json.loads((folder / "checkpoint" / "checkpoint.json").read_text())["step"] == int(
        found[1]
    )
    commands.sample(folder, label="3")


def test_kill_9_costs_no_more_than_the_steps_since_the_last_checkpoint(
    example: Path, tmp_path: Path
) -> None:
    """Killed three times wherever it was, the run comes to the loss curve of one never killed."""
    options = ["training.steps=120", "training.checkpoint_every=7"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    commands.train(example, output=str(whole), set_=options)
    command = [*CONDMOD, "train", str(example), f"--output={folder}", "--resume"]
    command += [f"--set={option}" for option in options]
    for lines in (10, 40, 80):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True) as process:
            _wait_for_a_line(folder / "metrics.jsonl", process, lines)
            process.kill()
    commands.train(example, output=str(folder), set_=options, resume=True)
    one, two = (journal.read(run / "metrics.jsonl") for run in (whole, folder))
    assert [(line["step"], line["loss"]) for line in one] == [
        (line["step"], line["loss"]) for line in two
    ]
    finished = [json.loads((run / "metrics.json").read_text()) for run in (whole, folder)]
    assert finished[0]["held_out_loss"] == finished[1]["held_out_loss"]


def test_resume_of_a_finished_run_prints_its_figures_again(
    run: Path, example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "metrics.json").stat().st_mtime_ns
    commands.train(example, output=str(run), resume=True, json=True)
    out, err = capsys.readouterr()
    assert json.loads(out)["held_out_loss"]
    assert f"the run in {run} is finished" in err
    assert (run / "metrics.json").stat().st_mtime_ns == before


def test_overwrite_and_resume_exclude_each_other(example: Path, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="exclude each other"):
        commands.train(example, output=str(tmp_path / "run"), overwrite=True, resume=True)


def test_a_comparison_prints_table_and_findings(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "compare"
    commands.compare(["film", "none"], seeds=1, config=example, output=str(folder))
    out, err = capsys.readouterr()
    assert "held-out loss: " in out
    assert out.endswith(f"look at {folder}/report.html\n")
    assert "[2/2] none seed 0: held-out loss " in err
    commands.compare(
        ["film", "none"], seeds=1, config=example, output=str(folder), resume=True, json=True
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["specs"] == ["film", "none"]


@pytest.mark.parametrize("key", ["modulator", "seed", "output"])
def test_what_differs_from_run_to_run_is_not_set_for_all(example: Path, key: str) -> None:
    with pytest.raises(typer.BadParameter, match=f"--set {key}: a comparison takes "):
        commands.compare(["film", "none"], config=example, set_=[f"{key}=1"])


@pytest.mark.parametrize(
    ("word", "typed"),
    [
        ("film", "film"),
        ("film(scale='exp')", "\"film(scale='exp')\""),
        ("a b", "'a b'"),
        ('film(scale="exp")', "'film(scale=\"exp\")'"),
    ],
)
def test_the_command_of_a_report_can_be_typed_again(word: str, typed: str) -> None:
    assert commands._quoted(word) == typed
    assert shlex.split(typed) == [word]


def _wait_for_a_line(log: Path, process: "subprocess.Popen[str]", lines: int = 1) -> None:
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= lines):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
