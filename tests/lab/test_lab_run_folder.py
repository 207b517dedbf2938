"""A run folder is overwritten only when asked, and never when it is somebody else's."""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from condmod import CheckpointError
from condmod.serialization import save_checkpoint
from condmod_lab import folders
from condmod_lab.config import TrainConfig
from condmod_lab.errors import RunFolderError, RunFolderExistsError
from condmod_lab.network import build
from condmod_lab.run_folder import DataFacts, Into, RunFolder
from condmod_lab.writing import remove, save_text

Tiny = Callable[..., TrainConfig]
FACTS = DataFacts(tuple("0123456789"), (1, 8, 8), ink=True, fingerprint="0" * 8)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "one")


@pytest.fixture
def finished(folder: RunFolder, tiny: Tiny) -> RunFolder:
    config = tiny().resolve(10)
    folder.claim(config, "new")
    save(folder, config, step=5)
    folder.log.write_text('{"step": 5, "loss": 1.0, "seconds": 2.0}\n')
    return folder


def save(folder: RunFolder, config: TrainConfig, step: int) -> None:
    folder.save(tensors(config), config, FACTS, step, training={})


def tensors(config: TrainConfig) -> dict[str, torch.Tensor]:
    return {
        f"average.{name}": value
        for name, value in build(config, 10, FACTS.shape).state_dict().items()
    }


def test_a_former_run_is_refused_without_overwrite_and_left_as_it_was(
    finished: RunFolder, tiny: Tiny
) -> None:
    with pytest.raises(RunFolderExistsError) as caught:
        finished.claim(tiny(), "new")
    assert str(caught.value) == (
        f"{finished.path} holds a run already; add --resume to go on with it, --overwrite to "
        "replace it, or name another folder with --output"
    )
    assert isinstance(caught.value, FileExistsError)
    assert finished.load().step == 5


def test_overwrite_removes_every_result_of_the_former_run(finished: RunFolder, tiny: Tiny) -> None:
    (finished.path / ".checkpoint.123.new").mkdir()
    finished.claim(tiny("seed=9"), "overwrite")
    assert [entry.name for entry in finished.path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("into", ["new", "overwrite", "resume"])
def test_a_folder_with_anything_else_in_it_is_never_overwritten(
    finished: RunFolder, tiny: Tiny, into: Into
) -> None:
    (finished.path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderExistsError, match=r"holds what no run wrote \(thesis.tex\)"):
        finished.claim(tiny(), into)
    assert finished.load().step == 5


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json"])
def test_a_foreign_folder_whose_file_happens_to_have_our_name_is_never_overwritten(
    folder: RunFolder, tiny: Tiny, name: str
) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / name).write_text("theirs: 1\n")
    with pytest.raises(RunFolderExistsError, match="holds no config or checkpoint of a run"):
        folder.claim(tiny(), "overwrite")
    assert (folder.path / name).read_text() == "theirs: 1\n"


def test_overwriting_does_not_follow_links(finished: RunFolder, tiny: Tiny, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    (finished.path / "drawn").symlink_to(elsewhere)
    finished.claim(tiny(), "overwrite")
    assert (elsewhere / "kept").read_text() == "kept"


@pytest.mark.parametrize("into", ["overwrite", "resume"])
def test_what_file_managers_leave_is_in_nobodys_way(
    finished: RunFolder, tiny: Tiny, into: Into
) -> None:
    (finished.path / ".DS_Store").write_bytes(b"")
    finished.claim(tiny().resolve(10), into)
    assert (finished.path / ".DS_Store").exists()


def test_an_empty_folder_is_taken(folder: RunFolder, tiny: Tiny) -> None:
    folder.path.mkdir(parents=True)
    folder.claim(tiny(), "new")
    assert (folder.path / "config.yaml").is_file()


def test_a_file_in_the_place_of_the_folder_is_refused(folder: RunFolder, tiny: Tiny) -> None:
    folder.path.parent.mkdir(parents=True)
    folder.path.write_text("a file")
    with pytest.raises(RunFolderExistsError, match="is a file; name another folder"):
        folder.claim(tiny(), "overwrite")
    with pytest.raises(RunFolderError, match=r"cannot write the run folder .*: Not a directory"):
        RunFolder(folder.path / "below").claim(tiny(), "overwrite")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(folder: RunFolder, tiny: Tiny) -> None:
    folder.path.mkdir(parents=True)
    folder.path.chmod(0o500)
    with pytest.raises(RunFolderError, match=r"cannot write the run folder .*: Permission denied"):
        folder.claim(tiny(), "new")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system of Linux")
def test_a_folder_on_a_file_system_that_takes_no_files_is_refused(tiny: Tiny) -> None:
    with pytest.raises(RunFolderError, match="cannot write the run folder /proc/self/run: "):
        RunFolder(Path("/proc/self/run")).claim(tiny(), "new")


def test_a_checkpoint_gives_back_network_config_and_step(finished: RunFolder, tiny: Tiny) -> None:
    trained = finished.load()
    assert (trained.step, trained.config, trained.facts) == (5, tiny().resolve(10), FACTS)
    assert not trained.net.training


@pytest.mark.parametrize("keep", [0, 7, 1000])
def test_a_truncated_checkpoint_is_a_clear_error(finished: RunFolder, keep: int) -> None:
    tensors = finished.checkpoint / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=re.escape(f"{tensors} is truncated or foreign")):
        finished.load()


def test_a_missing_checkpoint_is_a_clear_error(folder: RunFolder) -> None:
    with pytest.raises(CheckpointError, match="holds no condmod checkpoint"):
        folder.load()


def test_a_checkpoint_of_something_else_is_a_clear_error(folder: RunFolder) -> None:
    save_checkpoint(folder.checkpoint, {"weight": torch.zeros(2)}, {"kind": "other"})
    with pytest.raises(CheckpointError) as caught:
        folder.load()
    assert str(caught.value) == (
        f"{folder.checkpoint} is no checkpoint of `condmod train` or `condmod demo`: "
        "its kind is 'other'"
    )


def test_a_checkpoint_whose_config_was_tampered_with_is_a_clear_error(
    finished: RunFolder, tiny: Tiny
) -> None:
    held = tensors(tiny())
    document = json.loads((finished.checkpoint / "checkpoint.json").read_text())
    for key in ("config", "step", "data"):
        lacking = {name: value for name, value in document.items() if name != key}
        save_checkpoint(finished.checkpoint, held, lacking)
        with pytest.raises(CheckpointError, match="holds no readable config, step and data"):
            finished.load()
    other = tiny("backbone.channels=16").model_dump(mode="json")
    save_checkpoint(finished.checkpoint, held, {**document, "config": other})
    with pytest.raises(
        CheckpointError, match=r"its own config: \d+ tensors are missing.* anew with --overwrite"
    ):
        finished.load()


def test_a_disk_that_is_full_is_a_clear_error_and_keeps_the_last_checkpoint(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = finished.load().step

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("condmod_lab.run_folder.save_checkpoint", full)
    trained = finished.load()
    with pytest.raises(RunFolderError) as caught:
        save(finished, trained.config, step + 1)
    assert str(caught.value) == f"cannot write {finished.checkpoint}: No space left on device"
    assert finished.load().step == step


def test_a_checkpoint_with_an_endless_step_is_a_clear_error(finished: RunFolder) -> None:
    path = finished.checkpoint / "checkpoint.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "step": float("inf")}))
    with pytest.raises(CheckpointError):
        finished.load()


def test_what_a_run_writes_can_be_read_by_others_as_the_umask_says(finished: RunFolder) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in finished.path.rglob("*.*")}
    plain = modes["config.yaml"]
    assert {name: mode for name, mode in modes.items() if mode != plain and "." in name[1:]} == {}


def test_two_runs_do_not_write_into_one_folder(folder: RunFolder) -> None:
    """The lock goes with its process, however that ends; see the kills of test_lab_commands."""
    with folders.lock(folder.path):
        with pytest.raises(RunFolderError) as caught, folders.lock(folder.path):
            pass
        assert str(caught.value) == (
            f"another run is writing into {folder.path}; wait for its end, "
            "or name another folder with --output"
        )
    with folders.lock(folder.path):
        pass


def test_metrics_that_no_run_wrote_are_a_clear_error(finished: RunFolder) -> None:
    assert finished.metrics() == {}
    finished.figures.write_text("{")
    with pytest.raises(RunFolderError, match=r"metrics\.json is not readable JSON"):
        finished.metrics()
    for text in ("5", "[1]", "null", "{}"):
        finished.figures.write_text(text)
        with pytest.raises(RunFolderError) as caught:
            finished.metrics()
        assert str(caught.value) == (
            f"{finished.figures} holds no figures of a run but {json.loads(text)}; "
            "remove it and go on with --resume"
        )


@pytest.mark.parametrize("into", ["new", "overwrite", "resume"])
def test_a_name_that_is_too_long_is_a_clear_error(tmp_path: Path, tiny: Tiny, into: Into) -> None:
    folder = RunFolder(tmp_path / ("x" * 300))
    assert folder.metrics() == {}
    with pytest.raises(RunFolderError, match=r"cannot write the run folder .*: File name too long"):
        folder.claim(tiny(), into)


def test_a_folder_that_cannot_be_read_is_a_clear_error(
    finished: RunFolder, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(RunFolderError) as caught:
        finished.check(tiny(), "new")
    assert str(caught.value) == (
        f"cannot read the run folder {finished.path}: Permission denied; "
        "name another one with --output"
    )


def test_a_run_whose_removal_was_cut_off_is_not_finished(
    finished: RunFolder, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished.figures.write_text('{"held_out_loss": 1.0}')

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("condmod_lab.run_folder.remove", killed)
    with pytest.raises(KeyboardInterrupt):
        finished.claim(tiny(), "overwrite")
    assert finished.metrics() == {}


@pytest.mark.parametrize("into", ["new", "overwrite", "resume"])
def test_what_a_kill_left_of_a_first_write_is_no_run(
    folder: RunFolder, tiny: Tiny, into: Into
) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / ".config.yaml.new").write_text("modul")
    folder.claim(tiny(), into)
    assert [entry.name for entry in folder.path.iterdir()] == ["config.yaml"]


def test_a_kill_in_the_middle_of_overwriting_leaves_a_folder_that_is_known_as_a_run(
    finished: RunFolder, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = []

    def killed(entry: Path) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(remove(entry))

    monkeypatch.setattr("condmod_lab.run_folder.remove", killed)
    with pytest.raises(KeyboardInterrupt):
        finished.claim(tiny(), "overwrite")
    monkeypatch.undo()
    finished.claim(tiny("seed=9"), "overwrite")
    assert [entry.name for entry in finished.path.iterdir()] == ["config.yaml"]


def test_a_write_that_fails_leaves_the_file_before_and_no_debris(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_text(finished.path / "a.txt", "before")
    before = sorted(finished.path.iterdir())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunFolderError, match=r"cannot write .*a\.txt: No space left on device"):
        save_text(finished.path / "a.txt", "after")
    assert (finished.path / "a.txt").read_text() == "before"
    assert sorted(finished.path.iterdir()) == before
