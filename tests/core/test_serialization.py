"""Checkpoints: safetensors and JSON, whole or not at all, checked before a module is touched."""

import json
import os
import re
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import condmod
from condmod import CheckpointError
from condmod import serialization as saved


@pytest.fixture
def net() -> nn.Module:
    """A small module."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.fixture
def folder(tmp_path: Path, net: nn.Module) -> Path:
    """A checkpoint of that module."""
    folder = tmp_path / "deep" / "checkpoint"
    saved.save_checkpoint(folder, net.state_dict(), {"step": 3, "modulator": "film"})
    return folder


def test_a_checkpoint_comes_back_whole(folder: Path, net: nn.Module):
    checkpoint = saved.load_checkpoint(folder)
    assert checkpoint.document == {
        "format": 1,
        "tool": "condmod",
        "step": 3,
        "modulator": "film",
    }
    state = net.state_dict()
    assert checkpoint.tensors.keys() == state.keys()
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(tensor, state[name])
        assert tensor.dtype == state[name].dtype
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    saved.load_state(other, checkpoint.tensors)
    assert torch.equal(other[0].weight, net[0].weight)  # type: ignore[arg-type]


def test_a_checkpoint_is_safetensors_and_json_and_nothing_else(folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.json",
        "tensors.safetensors",
    ]
    assert json.loads((folder / "checkpoint.json").read_text())["tool"] == "condmod"
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_a_new_checkpoint_replaces_the_one_before(folder: Path):
    saved.save_checkpoint(folder, {"w": torch.ones(1)}, {"step": 4})
    checkpoint = saved.load_checkpoint(folder)
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.document["step"] == 4
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_a_save_that_fails_leaves_the_one_before_and_no_debris(folder: Path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError) as caught:
        saved.save_checkpoint(folder, {"w": torch.ones(1)}, {"step": object()})
    assert str(caught.value) == (
        "a checkpoint's document is plain JSON data: Object of type object is not JSON serializable"
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_a_rename_that_fails_puts_the_one_before_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    rename = Path.rename

    def failing(self: Path, target: Any) -> Path:
        if self.name.endswith(".new"):
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        saved.save_checkpoint(folder, {"w": torch.ones(1)}, {"step": 4})
    assert saved.load_checkpoint(folder).document["step"] == 3
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_tensors_that_share_memory_and_odd_layouts_are_saved_by_value(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "whole": base,
        "again": base,
        "part": base[1],
        "turned": base.T,
        "spread": base[:, :1].expand(3, 5),
        "parameter": nn.Parameter(base),
        "half": base.to(torch.bfloat16),
        "empty": torch.empty(0),
        "scalar": torch.tensor(3),
        "flags": base > 3,
    }
    saved.save_checkpoint(tmp_path / "c", tensors, {})
    loaded = saved.load_checkpoint(tmp_path / "c").tensors
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype


def test_a_document_comes_back_when_it_is_saved_again(folder: Path):
    checkpoint = saved.load_checkpoint(folder)
    saved.save_checkpoint(folder, checkpoint.tensors, checkpoint.document)
    assert saved.load_checkpoint(folder).document == checkpoint.document


@pytest.mark.parametrize(("key", "value"), [("format", "png"), ("tool", "other")])
def test_a_document_may_not_take_the_format_s_own_keys(tmp_path: Path, key: str, value: str):
    with pytest.raises(CheckpointError) as caught:
        saved.save_checkpoint(tmp_path / "c", {}, {key: value})
    assert str(caught.value) == (
        f"the key {key!r} of a checkpoint's document is condmod's own; got {value!r}"
    )
    assert not list(tmp_path.iterdir())


def test_the_config_of_a_component_goes_through_the_document(tmp_path: Path):
    config = condmod.configure("film(scale='one_plus', hidden=[8])")
    document = {"modulator": config.model_dump(mode="json"), "text": str(config)}
    saved.save_checkpoint(tmp_path / "c", {}, document)
    again = saved.load_checkpoint(tmp_path / "c").document
    assert condmod.configure(again["modulator"]) == config
    assert condmod.configure(again["text"]) == config


def _truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def _write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "without tensors": (
        lambda folder: (folder / "tensors.safetensors").unlink(),
        r"{} holds no condmod checkpoint: it needs checkpoint\.json and tensors\.safetensors$",
    ),
    "without a document": (
        lambda folder: (folder / "checkpoint.json").unlink(),
        r"{} holds no condmod checkpoint: it needs checkpoint\.json and tensors\.safetensors$",
    ),
    "an empty document": (
        _truncate("checkpoint.json", 0),
        r"{}.checkpoint\.json is not readable JSON: ",
    ),
    "half a document": (
        _truncate("checkpoint.json", 20),
        r"{}.checkpoint\.json is not readable JSON: ",
    ),
    "a document nested without end": (
        _write("checkpoint.json", "[" * 200_000),
        r"{}.checkpoint\.json is not readable JSON: ",
    ),
    "a document that is no text": (
        lambda folder: (folder / "checkpoint.json").write_bytes(b"\xff\xfe\x00"),
        r"{}.checkpoint\.json is not readable JSON: ",
    ),
    "a list for a document": (
        _write("checkpoint.json", "[]"),
        r"{}.checkpoint\.json was not written by condmod$",
    ),
    "another tool's document": (
        _write("checkpoint.json", '{"format": 1}'),
        r"{}.checkpoint\.json was not written by condmod$",
    ),
    "a later format": (
        _write("checkpoint.json", '{"tool": "condmod", "format": 2}'),
        r"{} has checkpoint format 2; this condmod reads 1$",
    ),
    "no format": (
        _write("checkpoint.json", '{"tool": "condmod"}'),
        r"{} has checkpoint format None; this condmod reads 1$",
    ),
    "empty tensors": (
        _truncate("tensors.safetensors", 0),
        r"{}.tensors\.safetensors is truncated or foreign: ",
    ),
    "half the tensors": (
        _truncate("tensors.safetensors", 300),
        r"{}.tensors\.safetensors is truncated or foreign: ",
    ),
    "a pickle for tensors": (
        lambda folder: torch.save({"w": torch.ones(2)}, folder / "tensors.safetensors"),
        r"{}.tensors\.safetensors is truncated or foreign: ",
    ),
    "text for tensors": (
        _write("tensors.safetensors", "hello, world"),
        r"{}.tensors\.safetensors is truncated or foreign: ",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_truncated_or_foreign_checkpoint_is_told_by_file_and_reason(
    folder: Path, spoil: Callable[[Path], Any], message: str
):
    spoil(folder)
    with pytest.raises(CheckpointError, match=message.format(re.escape(str(folder)))):
        saved.load_checkpoint(folder)


def test_tensors_cut_anywhere_are_a_checkpoint_error(folder: Path):
    path = folder / "tensors.safetensors"
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            saved.load_checkpoint(folder)


def test_a_missing_folder_and_a_file_are_no_checkpoint(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for name in ("nowhere", "file"):
        with pytest.raises(CheckpointError, match="holds no condmod checkpoint"):
            saved.load_checkpoint(tmp_path / name)


UNFIT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a missing key": (lambda state: state.pop("0.bias"), "missing 0.bias"),
    "a surplus key": (
        lambda state: state.update(extra=torch.ones(1)),
        "unexpected extra",
    ),
    "another shape": (
        lambda state: state.update({"0.bias": torch.ones(5)}),
        "0.bias is torch.float32 (5,), not torch.float32 (4,)",
    ),
    "a shape that would broadcast": (
        lambda state: state.update({"0.bias": torch.ones(1)}),
        "0.bias is torch.float32 (1,), not torch.float32 (4,)",
    ),
    "another dtype": (
        lambda state: state.update({"0.bias": torch.ones(4, dtype=torch.float64)}),
        "0.bias is torch.float64 (4,), not torch.float32 (4,)",
    ),
    "several mistakes": (
        lambda state: (state.pop("0.bias"), state.update(extra=torch.ones(1))),
        "missing 0.bias; unexpected extra",
    ),
    "more than eight": (
        lambda state: state.update({f"x{number}": torch.ones(1) for number in range(10)}),
        "; ".join(f"unexpected x{number}" for number in range(8)) + "; and 2 more",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), UNFIT.values(), ids=UNFIT)
def test_a_state_that_does_not_fit_leaves_the_module_as_it_was(
    net: nn.Module, spoil: Callable[[dict[str, Any]], Any], message: str
):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    spoil(state)
    with pytest.raises(CheckpointError) as caught:
        saved.load_state(net, state)
    assert str(caught.value) == f"the checkpoint does not fit the module: {message}"
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_document_without_finite_numbers_never_touches_the_disk(tmp_path: Path, loss: float):
    with pytest.raises(CheckpointError, match=r"^a checkpoint's document is plain JSON data: Out"):
        saved.save_checkpoint(tmp_path / "deep" / "c", {}, {"loss": loss})
    assert not list(tmp_path.iterdir())


class _KilledError(BaseException):
    """The process ends here: nothing that would tidy up runs any more."""


def _killed_between_the_renames(folder: Path) -> None:
    """Leave what a kill between the two renames of a save leaves."""
    folder.rename(folder.with_name(f".{folder.name}.old"))
    half = folder.with_name(f".{folder.name}.new")
    half.mkdir()
    (half / "tensors.safetensors").write_text("half")


def test_the_only_good_checkpoint_survives_a_kill_between_the_renames(folder: Path):
    _killed_between_the_renames(folder)
    assert saved.load_checkpoint(folder).document["step"] == 3


def test_whoever_reads_while_checkpoints_are_saved_disturbs_none_and_meets_whole_ones(
    folder: Path, net: nn.Module
):
    """A reader that put things in order itself would come between a save's two renames."""
    stop, problems, steps = threading.Event(), [], []

    def read() -> None:
        while not stop.is_set():
            try:
                found = saved.load_checkpoint(folder)
                assert found.tensors.keys() == net.state_dict().keys()
                steps.append(found.document["step"])
            except saved.CheckpointError:  # five saves in a row came between
                pass
            except Exception as error:  # noqa: BLE001  whatever it is, the main thread tells it
                problems.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for step in range(200):
            saved.save_checkpoint(folder, net.state_dict(), {"step": step})
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert problems == []
    assert len(set(steps)) > 1


def test_a_save_after_a_kill_that_fails_too_keeps_the_only_good_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    _killed_between_the_renames(folder)

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(saved, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        saved.save_checkpoint(folder, {"w": torch.ones(1)}, {"step": 4})
    assert saved.load_checkpoint(folder).document["step"] == 3
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_a_save_after_a_kill_replaces_what_was_there_and_leaves_no_debris(folder: Path):
    _killed_between_the_renames(folder)
    saved.save_checkpoint(folder, {"w": torch.ones(1)}, {"step": 4})
    assert saved.load_checkpoint(folder).document["step"] == 4
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_at_every_step_of_a_save_a_whole_checkpoint_stands(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Kill a save at its n-th step, for every n; each time the next load finds a whole one."""
    steps = {"left": 0}

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if steps["left"] <= 0:
                raise _KilledError
            steps["left"] -= 1
            return function(*args, **kwargs)

        return step

    done, killed = False, 0
    while not done:
        steps["left"] = killed
        with monkeypatch.context() as patch:
            for owner, name in (
                (saved, "save_file"),
                (saved.os, "fsync"),
                (saved.shutil, "rmtree"),
                (Path, "rename"),
                (Path, "mkdir"),
                (Path, "write_text"),
            ):
                patch.setattr(owner, name, killing(getattr(owner, name)))
            try:
                saved.save_checkpoint(folder, {"w": torch.ones(1)}, {"step": 4})
                done = True
            except _KilledError:
                killed += 1
        assert saved.load_checkpoint(folder).document["step"] in {3, 4}
    assert killed > 8
    assert saved.load_checkpoint(folder).document["step"] == 4
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_a_former_checkpoint_is_read_where_nothing_can_be_renamed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    _killed_between_the_renames(folder)

    def read_only(self: Path, target: Any) -> Path:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "rename", read_only)
    assert saved.load_checkpoint(folder).document["step"] == 3


def test_a_full_disk_is_an_oserror_and_the_one_before_stays(folder: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"^cannot write .*tensors\.safetensors: .*too large"):
            saved.save_checkpoint(folder, {"w": torch.ones(100_000)}, {"step": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    assert saved.load_checkpoint(folder).document["step"] == 3
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_a_module_without_memory_is_refused(folder: Path):
    with torch.device("meta"):
        empty = nn.Linear(3, 4)
    with pytest.raises(CheckpointError) as caught:
        saved.load_state(empty, {"weight": torch.ones(4, 3), "bias": torch.ones(4)})
    assert str(caught.value) == (
        "the checkpoint does not fit the module: "
        "bias is on the meta device; call to_empty(device=...) first; "
        "weight is on the meta device; call to_empty(device=...) first"
    )
