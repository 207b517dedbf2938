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
from condmod_lab.backbone import build
from condmod_lab.config import TrainConfig
from condmod_lab.errors import RunFolderError, RunFolderExistsError
from condmod_lab.run_folder import RunFolder

Tiny = Callable[..., TrainConfig]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "one")


@pytest.fixture
def finished(folder: RunFolder, tiny: Tiny) -> RunFolder:
    config = tiny()
    folder.claim(config, overwrite=False)
    folder.save(build(config), config, step=5)
    folder.log.write_text("{}\n")
    return folder


def test_a_former_run_is_refused_without_overwrite_and_left_as_it_was(
    finished: RunFolder, tiny: Tiny
) -> None:
    with pytest.raises(RunFolderExistsError) as caught:
        finished.claim(tiny(), overwrite=False)
    assert str(caught.value) == (
        f"{finished.path} holds a run already; add --overwrite to replace it, "
        "or name another folder with --output"
    )
    assert isinstance(caught.value, FileExistsError)
    assert finished.load().step == 5


def test_overwrite_removes_every_result_of_the_former_run(finished: RunFolder, tiny: Tiny) -> None:
    (finished.path / ".checkpoint.123.new").mkdir()
    finished.claim(tiny("seed=9"), overwrite=True)
    assert [entry.name for entry in finished.path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_anything_else_in_it_is_never_overwritten(
    finished: RunFolder, tiny: Tiny, overwrite: bool
) -> None:
    (finished.path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderExistsError, match=r"holds what no run wrote \(thesis.tex\)"):
        finished.claim(tiny(), overwrite=overwrite)
    assert finished.load().step == 5


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json"])
def test_a_foreign_folder_whose_file_happens_to_have_our_name_is_never_overwritten(
    folder: RunFolder, tiny: Tiny, name: str
) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / name).write_text("theirs: 1\n")
    with pytest.raises(RunFolderExistsError, match="holds no config or checkpoint of a run"):
        folder.claim(tiny(), overwrite=True)
    assert (folder.path / name).read_text() == "theirs: 1\n"


def test_overwriting_does_not_follow_links(finished: RunFolder, tiny: Tiny, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    (finished.path / "drawn").symlink_to(elsewhere)
    finished.claim(tiny(), overwrite=True)
    assert (elsewhere / "kept").read_text() == "kept"


def test_an_empty_folder_is_taken(folder: RunFolder, tiny: Tiny) -> None:
    folder.path.mkdir(parents=True)
    folder.claim(tiny(), overwrite=False)
    assert (folder.path / "config.yaml").is_file()


def test_a_file_in_the_place_of_the_folder_is_refused(folder: RunFolder, tiny: Tiny) -> None:
    folder.path.parent.mkdir(parents=True)
    folder.path.write_text("a file")
    with pytest.raises(RunFolderExistsError, match="is a file; name another folder"):
        folder.claim(tiny(), overwrite=True)
    with pytest.raises(RunFolderError, match=r"cannot write the run folder .*: Not a directory"):
        RunFolder(folder.path / "below").claim(tiny(), overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(folder: RunFolder, tiny: Tiny) -> None:
    folder.path.mkdir(parents=True)
    folder.path.chmod(0o500)
    with pytest.raises(RunFolderError, match=r"cannot write the run folder .*: Permission denied"):
        folder.claim(tiny(), overwrite=False)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system of Linux")
def test_a_folder_on_a_file_system_that_takes_no_files_is_refused(tiny: Tiny) -> None:
    with pytest.raises(RunFolderError, match="cannot write the run folder /proc/self/run: "):
        RunFolder(Path("/proc/self/run")).claim(tiny(), overwrite=False)


def test_a_checkpoint_gives_back_network_config_and_step(finished: RunFolder, tiny: Tiny) -> None:
    trained = finished.load()
    assert (trained.step, trained.config) == (5, tiny())
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
    tensors = build(tiny()).state_dict()
    document = {"kind": "condmod_lab.digits", "step": 5}
    save_checkpoint(finished.checkpoint, tensors, document)
    with pytest.raises(CheckpointError, match="holds no readable config and step"):
        finished.load()
    other = tiny("backbone.channels=16").model_dump(mode="json")
    save_checkpoint(finished.checkpoint, tensors, {**document, "config": other})
    with pytest.raises(
        CheckpointError, match=r"does not fit its own config: \d+ tensors are missing"
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
        finished.save(trained.net, trained.config, step + 1)
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
