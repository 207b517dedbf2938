"""A comparison: fair to every spec, refused where it cannot be, continued where it stopped."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from condmod import SiteError, UnknownNameError
from condmod_lab import compare as comparing
from condmod_lab import flow
from condmod_lab.compare import compare
from condmod_lab.comparison_folder import ComparisonFolder
from condmod_lab.config import TrainConfig
from condmod_lab.errors import ConfigError, DivergedError, RunFolderError, RunFolderExistsError
from condmod_lab.network import Network, build
from condmod_lab.order import Draws
from condmod_lab.run_folder import Into
from condmod_lab.writing import remove

Tiny = Callable[..., TrainConfig]
SPECS = ["film", "film(scale='exp')", "none"]


def start(
    config: TrainConfig,
    console: Console,
    specs: Sequence[str] = SPECS,
    seeds: Sequence[int] = (0, 1),
    jobs: int = 1,
    into: Into = "new",
) -> dict[str, Any]:
    return compare(specs, config, seeds, console, command="condmod compare", jobs=jobs, into=into)


def steady(document: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on how fast the machine was."""
    figures = {
        name: figure["specs"]
        for name, figure in document["figures"].items()
        if name not in ("step_seconds", "sample_seconds")
    }
    return {"figures": figures, "pairs": document["pairs"], "curves": document["curves"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished comparison, and its document."""
    from io import StringIO

    from condmod_lab.config import make_config

    path = tmp_path_factory.mktemp("compare") / "whole"
    config = make_config(
        {
            "output": str(path),
            "backbone": {"channels": 8, "blocks": 1, "condition_dim": 8},
            "training": {"steps": 6, "batch": 16, "log_every": 2, "checkpoint_every": 3},
            "sampling": {"samples": 40, "steps": 2},
        }
    )
    return path, start(config, Console(file=StringIO()))


def test_a_comparison_leaves_table_picture_report_and_every_run(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    path, document = whole
    assert sorted(entry.name for entry in path.iterdir() if entry.name != ".lock") == [
        "comparison.png",
        "comparison.yaml",
        "pairs.csv",
        "report.html",
        "results.json",
        "runs",
        "table.csv",
    ]
    assert json.loads((path / "results.json").read_text()) == json.loads(json.dumps(document))
    with (path / "table.csv").open() as file:
        assert [row["spec"] for row in csv.DictReader(file)] == SPECS
    assert (path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (path / "report.html").read_text()
    assert all(spec.replace("'", "&#39;") in page for spec in SPECS)
    for spec in SPECS:
        for seed in (0, 1):
            assert ComparisonFolder(path).run(spec, seed).metrics()["modulator"] == spec


def test_every_figure_has_a_value_for_each_spec_and_seed(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    _, document = whole
    for figure in document["figures"].values():
        assert list(figure["specs"]) == SPECS
        for found in figure["specs"].values():
            assert len(found["values"]) == 2
            assert None not in found["values"]
    judged = [name for name, figure in document["figures"].items() if figure["reduce"]]
    assert len(document["pairs"]) == 3 * len(judged)
    assert document["failed"] == {}


def test_the_figures_are_those_of_the_runs(whole: tuple[Path, dict[str, Any]]) -> None:
    path, document = whole
    for spec in SPECS:
        for seed in (0, 1):
            metrics = ComparisonFolder(path).run(spec, seed).metrics()
            for name, figure in document["figures"].items():
                assert figure["specs"][spec]["values"][seed] == pytest.approx(metrics[name])


def test_all_specs_learn_and_are_judged_from_the_same_start_order_and_noise(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each run meets, by seed and spec: what it starts as, learns from and draws from."""
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}
    now: list[torch.Tensor] = []

    def run(config: TrainConfig, *rest: Any, **options: Any) -> dict[str, Any]:
        now.clear()
        try:
            return real_run(config, *rest, **options)
        finally:
            seen[config.seed, str(config.modulator)] = list(now)

    def errors(net: Any, images: torch.Tensor, labels: torch.Tensor, draws: Draws) -> Any:
        now.extend((images, labels, draws.present, draws.t, draws.noise))
        return flow.flow_errors(net, images, labels, draws)

    def draw(net: Network, noise: torch.Tensor, *rest: Any, **options: Any) -> Any:
        now.append(noise)
        return flow.draw(net, noise, *rest, **options)

    def built(*rest: Any) -> Network:
        net = build(*rest)
        shared = {
            name: value
            for name, value in net.state_dict().items()
            if name.startswith("encoder") or "conv" in name or "body.e" in name
        }
        assert len(shared) > 10
        now.extend(value.clone() for value in shared.values())
        return net

    real_run = comparing.run
    monkeypatch.setattr(comparing, "run", run)
    monkeypatch.setattr("condmod_lab.training.build", built)
    for module in ("training", "workflow"):
        monkeypatch.setattr(f"condmod_lab.{module}.flow_errors", errors)
    monkeypatch.setattr("condmod_lab.workflow.draw", draw)
    specs = ["film", "adaln_zero", "none"]
    start(tiny(), console, specs)
    assert len(seen) == 6
    for seed in (0, 1):
        first = seen[seed, "film"]
        assert len(first) > 5 * 6 + 5 * 8 + 2  # steps, times of the held-out loss, drawings
        for spec in specs:
            assert len(seen[seed, spec]) == len(first)
            assert all(map(torch.equal, seen[seed, spec], first))
    assert not torch.equal(seen[0, "film"][-1], seen[1, "film"][-1])


def test_side_by_side_or_one_after_the_other_is_the_same(
    whole: tuple[Path, dict[str, Any]], tiny: Tiny, console: Console, tmp_path: Path
) -> None:
    document = start(tiny(output=str(tmp_path / "two")), console, jobs=2)
    assert document["machine"]["jobs"] == 2
    assert steady(document) == steady(whole[1])


def test_a_finished_comparison_goes_on_to_the_same_end_without_another_run(
    whole: tuple[Path, dict[str, Any]],
    tiny: Tiny,
    console: Console,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(whole[0], tmp_path / "again")
    monkeypatch.setattr(comparing, "run", None)
    config = tiny(output=str(tmp_path / "again"))
    assert steady(start(config, console, into="resume")) == steady(whole[1])
    assert "6 of 6 runs are finished already" in console.file.getvalue()


def test_an_interrupted_comparison_says_where_it_is_and_goes_on_there(
    whole: tuple[Path, dict[str, Any]],
    tiny: Tiny,
    console: Console,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny(output=str(tmp_path / "stopped"))
    steps = []

    def errors(*args: Any) -> Any:
        steps.append(None)
        if len(steps) == 6 + 4:  # a whole run, and most of another
            signal.raise_signal(signal.SIGINT)
        return flow.flow_errors(*args)

    with monkeypatch.context() as patch:
        patch.setattr("condmod_lab.training.flow_errors", errors)
        with pytest.raises(KeyboardInterrupt):
            start(config, console)
    assert "interrupted: 1 of 6 runs are finished; go on with --resume" in console.file.getvalue()
    kept = ComparisonFolder(Path(config.output)).run("film", 0)
    before = kept.figures.stat().st_mtime_ns
    assert ComparisonFolder(Path(config.output)).run(SPECS[1], 0).load().step == 4
    assert steady(start(config, console, into="resume")) == steady(whole[1])
    assert kept.figures.stat().st_mtime_ns == before


def test_more_specs_and_seeds_join_a_comparison_and_finished_runs_stay(
    whole: tuple[Path, dict[str, Any]], tiny: Tiny, console: Console, tmp_path: Path
) -> None:
    config = tiny(output=str(tmp_path / "grown"))
    start(config, console, specs=SPECS[:2], seeds=[0])
    kept = ComparisonFolder(Path(config.output)).run("film", 0)
    before = kept.figures.stat().st_mtime_ns
    document = start(config, console, into="resume")
    assert steady(document) == steady(whole[1])
    assert kept.figures.stat().st_mtime_ns == before


def test_a_run_that_diverges_is_told_and_does_not_take_the_others_with_it(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()

    def run(one: TrainConfig, *rest: Any, **options: Any) -> dict[str, Any]:
        if (str(one.modulator), one.seed) == ("none", 1):
            raise DivergedError("the loss is nan")
        return real(one, *rest, **options)

    real = comparing.run
    monkeypatch.setattr(comparing, "run", run)
    document = start(config, console)
    assert document["failed"] == {"none seed 1": "the loss is nan"}
    assert "none seed 1: the loss is nan" in console.file.getvalue()
    accuracy = document["figures"]["conditional_accuracy"]["specs"]
    assert accuracy["none"]["values"][1] is None
    assert None not in accuracy["film"]["values"]


def test_a_mistake_in_one_spec_is_told_and_does_not_take_the_others_with_it(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(one: TrainConfig, *rest: Any, **options: Any) -> dict[str, Any]:
        if str(one.modulator) == "none":
            raise TypeError("one argument too many")
        return real(one, *rest, **options)

    real = comparing.run
    monkeypatch.setattr(comparing, "run", run)
    assert start(tiny(), console)["failed"] == {
        f"none seed {seed}": "TypeError: one argument too many" for seed in (0, 1)
    }


def test_a_comparison_without_any_finished_run_has_nothing_to_show(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> dict[str, Any]:
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(comparing, "run", run)
    config = tiny()
    with pytest.raises(RunFolderError) as caught:
        start(config, console)
    assert str(caught.value) == (
        f"all 6 runs in {config.output} failed, the first of them with: the loss is nan"
    )


@pytest.mark.parametrize(
    ("specs", "seeds", "message"),
    [
        (
            ["film"],
            [0],
            "a comparison takes two specs or more, as in condmod compare film none; got film",
        ),
        (
            [],
            [0],
            "a comparison takes two specs or more, as in condmod compare film none; got none",
        ),
        (["film", "none"], [], "a comparison takes one seed or more, as in --seeds 3; got none"),
        (
            ["film", "none", "film(scale='raw')"],
            [0],
            "film and film(scale='raw') are the same modulator; leave one out",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tiny: Tiny, console: Console, specs: list[str], seeds: list[int], message: str
) -> None:
    config = tiny()
    with pytest.raises(ConfigError) as caught:
        start(config, console, specs, seeds)
    assert str(caught.value) == message
    assert not Path(config.output).exists()


def test_an_unknown_spec_is_refused_before_anything(tiny: Tiny, console: Console) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'film'"):
        start(tiny(), console, ["fillm", "none"])


def test_every_spec_that_does_not_fit_is_named_with_place_and_reason_before_training(
    tiny: Tiny, console: Console
) -> None:
    config = tiny()
    with pytest.raises(SiteError) as caught:
        start(config, console, ["film", "adaln_zero(parts=3)", "ada_group_norm(groups=5)"])
    text = str(caught.value)
    assert text.startswith(
        "2 of 3 specs cannot be compared; leave them out or mend them:\n  adaln_zero(parts=3): "
    )
    assert text.count("blocks.0.modulator") == 2
    assert not Path(config.output).exists()


def test_what_the_machine_cannot_do_is_told_before_anything(tiny: Tiny, console: Console) -> None:
    config = tiny("trackers=[dvclive]")
    with pytest.raises(ConfigError, match="'dvclive' is not installed"):
        start(config, console)
    assert not Path(config.output).exists()


def test_a_comparison_on_several_processes_is_refused(
    tiny: Tiny, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="use --jobs"):
        start(tiny(), console)


class TestAFolderThatExists:
    @pytest.fixture
    def config(self, whole: tuple[Path, dict[str, Any]], tiny: Tiny) -> TrainConfig:
        config = tiny()
        shutil.copytree(whole[0], config.output)
        return config

    def test_is_refused_and_left_as_it_was(self, config: TrainConfig, console: Console) -> None:
        before = (Path(config.output) / "results.json").read_text()
        with pytest.raises(RunFolderExistsError) as caught:
            start(config, console)
        assert str(caught.value) == (
            f"{config.output} holds a comparison already; add --resume to go on with it, "
            "--overwrite to replace it, or name another folder with --output"
        )
        assert (Path(config.output) / "results.json").read_text() == before

    def test_is_overwritten_when_asked(self, config: TrainConfig, console: Console) -> None:
        start(config, console, ["add", "none"], [1], into="overwrite")
        assert len(list(Path(config.output).glob("runs/*/seed-*"))) == 2

    @pytest.mark.parametrize("into", ["overwrite", "resume"])
    @pytest.mark.parametrize("place", ["", "runs", "runs/{film}", "runs/{film}/seed-0"])
    def test_is_never_touched_where_it_holds_anything_else(
        self, config: TrainConfig, console: Console, into: Into, place: str
    ) -> None:
        film = ComparisonFolder(Path(config.output)).run("film", 0).path.parent.name
        thesis = Path(config.output) / place.format(film=film) / "thesis.tex"
        thesis.write_text("years of work")
        with pytest.raises(RunFolderExistsError, match=r"holds what no run wrote \(.*thesis.tex\)"):
            start(config, console, into=into)
        assert thesis.read_text() == "years of work"

    @pytest.mark.parametrize("name", ["mine", "mine/seed-0", "film-123456/notes"])
    def test_is_never_touched_where_a_folder_among_its_runs_is_none_of_them(
        self, config: TrainConfig, console: Console, name: str
    ) -> None:
        (Path(config.output) / "runs" / name).mkdir(parents=True)
        with pytest.raises(RunFolderExistsError, match=r"holds what no run wrote \(runs/"):
            start(config, console, into="overwrite")

    @pytest.mark.parametrize("into", ["overwrite", "resume"])
    @pytest.mark.parametrize("removed", range(6))
    def test_goes_on_and_is_overwritten_after_a_kill_in_the_middle_of_overwriting(
        self,
        config: TrainConfig,
        console: Console,
        monkeypatch: pytest.MonkeyPatch,
        removed: int,
        into: Into,
    ) -> None:
        """Killed in each removal, which has then come no further than the first file of many."""
        done = []

        def killed(entry: Path) -> None:
            if len(done) == removed:
                for file in sorted(entry.rglob("metrics.jsonl"))[:1] or [entry]:
                    file.unlink()
                raise KeyboardInterrupt
            done.append(remove(entry))

        folder = ComparisonFolder(Path(config.output))
        shared = config.resolve(10)
        with monkeypatch.context() as patch:
            patch.setattr("condmod_lab.comparison_folder.remove", killed)
            with pytest.raises(KeyboardInterrupt):
                folder.claim(SPECS, [0, 1], shared, "overwrite")
        folder.claim(SPECS, [0, 1], shared, into)
        found = folder.path.glob("runs/*/*")
        assert all((run / "metrics.jsonl").exists() for run in found)
        assert not list(folder.path.glob(".comparison.*"))

    @pytest.mark.parametrize("into", ["new", "overwrite", "resume"])
    def test_is_none_where_a_kill_left_no_more_than_half_a_plan(
        self, tiny: Tiny, into: Into
    ) -> None:
        folder = ComparisonFolder(Path(tiny().output))
        folder.path.mkdir()
        (folder.path / ".comparison.yaml.new").write_text("spe")
        folder.claim(SPECS, [0], tiny().resolve(10), into)
        assert [entry.name for entry in folder.path.iterdir()] == ["comparison.yaml"]

    @pytest.mark.parametrize("name", ["measures.safetensors", "samples.safetensors"])
    def test_with_a_torn_file_in_a_run_says_which_and_what_to_do(
        self, config: TrainConfig, console: Console, name: str
    ) -> None:
        run = ComparisonFolder(Path(config.output)).run("film", 0)
        (run.path / name).write_bytes(b"torn")
        with pytest.raises(RunFolderError) as caught:
            start(config, console, into="resume")
        assert str(caught.value).startswith(f"{run.path / name} cannot be read (")
        assert str(caught.value).endswith(f"; remove {run.figures} and go on with --resume")
        run.figures.unlink()
        assert start(config, console, into="resume")["failed"] == {}

    def test_of_another_config_cannot_go_on(
        self, config: TrainConfig, console: Console, tiny: Tiny
    ) -> None:
        with pytest.raises(RunFolderError) as caught:
            start(tiny("training.steps=7"), console, into="resume")
        assert str(caught.value) == (
            f"{config.output} holds a comparison of another config, so it cannot go on with this "
            "one; it has\n  training.steps: 6, not 7\ngive the same config, add --overwrite to "
            "replace the comparison, or name another folder with --output"
        )

    def test_does_not_shrink_in_silence(self, config: TrainConfig, console: Console) -> None:
        with pytest.raises(RunFolderError) as caught:
            start(config, console, ["film", "add"], [1], into="resume")
        assert str(caught.value).startswith(f"{config.output} also compares ")
        assert "none" in str(caught.value)
        assert "seed 0" in str(caught.value)

    @pytest.mark.parametrize("into", ["overwrite", "resume"])
    def test_of_a_single_run_is_no_comparison(
        self, config: TrainConfig, console: Console, tiny: Tiny, into: Into
    ) -> None:
        run = ComparisonFolder(Path(config.output)).run("film", 0).path
        with pytest.raises(RunFolderExistsError):
            start(tiny(output=str(run)), console, into=into)


def beginning(tiny: Tiny, tmp_path: Path) -> "subprocess.Popen[str]":
    """A comparison in a process of its own, with two runs under way."""
    config = tmp_path / "config.yaml"
    config.write_text(tiny("training.steps=5000", "training.checkpoint_every=5").to_yaml())
    command = [sys.executable, "-m", "condmod", "compare", *SPECS, f"--config={config}"]
    command += ["--seeds=1", "--jobs=2", f"--output={tmp_path / 'begun'}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("begun/runs/*/*/checkpoint"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def children(process: "subprocess.Popen[str]") -> list[int]:
    """The processes that carry out the runs."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            command = (status.parent / "cmdline").read_bytes()
            if f" {process.pid} " in status.read_text() and b"popen_loky" in command:
                found.append(int(status.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes as Linux does")
def test_sigterm_of_a_comparison_ends_its_runs_too(tiny: Tiny, tmp_path: Path) -> None:
    with beginning(tiny, tmp_path) as process:
        runs = children(process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert "interrupted: 0 of 3 runs are finished; go on with --resume" in err
    assert len(runs) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{run}/cmdline").exists() for run in runs):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes as Linux does")
def test_a_process_that_was_killed_is_told_in_a_clear_line(tiny: Tiny, tmp_path: Path) -> None:
    with beginning(tiny, tmp_path) as process:
        os.kill(children(process)[0], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1] == (
        "error: the process of a run was killed, as happens where memory runs out; 0 of 3 runs "
        "are finished; go on with --resume, perhaps with fewer --jobs"
    )


def test_kill_9_of_a_comparison_in_its_middle_costs_no_finished_run(
    tiny: Tiny, console: Console, tmp_path: Path
) -> None:
    options, specs = ["training.steps=40", "training.checkpoint_every=5"], ["film", "none"]
    config = tmp_path / "config.yaml"
    config.write_text(tiny(*options).to_yaml())
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "condmod", "compare", *specs, "--seeds=2", "--jobs=2"]
    command += [f"--config={config}", f"--output={folder}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not list(folder.glob("runs/*/*/metrics.json")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            os.kill(process.pid, signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/metrics.json")}
    deadline = time.monotonic() + 60
    while True:  # until the orphaned workers have let go of their runs
        done = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True)
        if "another run is writing" not in done.stderr or time.monotonic() > deadline:
            break
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    whole = start(tiny(*options, output=str(tmp_path / "whole")), console, specs)
    assert steady(json.loads(done.stdout)) == steady(json.loads(json.dumps(whole)))
