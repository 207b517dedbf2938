"""Checkpoints under kill -9 and on a full disk: the last good one stands at every moment.

Every kill here is a real SIGKILL (or SIGXFSZ) of a real process. One helper process runs this very
file, imports torch once, and forks a child per kill; the tests ask it for one scenario each.
"""

import ctypes
import errno
import functools
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from condmod import CheckpointError
from condmod import serialization as saved

resource = pytest.importorskip("resource", reason="only POSIX kills and limits a process so")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed children are forked")


# What is saved: everything follows from the step, so that a mixture of two saves is seen.


class Size(NamedTuple):
    """How large a checkpoint is: numbers in its largest tensor, steps written in its document."""

    numbers: int
    notes: int


SMALL = Size(1000, 100)


def _tensors(step: int, size: Size) -> dict[str, Tensor]:
    large = torch.full((size.numbers,), float(step))
    return {"large": large, "half": large[:7].to(torch.bfloat16), "step": torch.tensor(step)}


def _document(step: int, size: Size) -> dict[str, Any]:
    return {"step": step, "size": list(size), "notes": [step] * size.notes}


def _save(folder: Path, step: int, size: Size = SMALL) -> None:
    saved.save_checkpoint(folder, _tensors(step, size), _document(step, size))


def _step(folder: Path) -> int | None:
    """The step of the checkpoint that a load finds, which has to be whole; None without one."""
    try:
        tensors, document = (found := saved.load_checkpoint(folder)).tensors, found.document
    except CheckpointError:
        assert not folder.exists()
        return None
    step, size = document["step"], Size(*document["size"])
    assert document == {"format": 1, "tool": "condmod", **_document(step, size)}
    whole = _tensors(step, size)
    assert tensors.keys() == whole.keys()
    for name, tensor in whole.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name
    return step


def _assert_tidy(folder: Path) -> None:
    inside, beside = sorted(os.listdir(folder)), os.listdir(folder.parent)
    assert (inside, beside) == ([saved.DOCUMENT, saved.TENSORS], [folder.name]), (inside, beside)


def _assert_saves_again(folder: Path, step: int) -> None:
    _save(folder, step)
    assert _step(folder) == step
    _assert_tidy(folder)


# What an earlier save left: a room is the folder in which the checkpoint "c" stands.


def _nothing(room: Path) -> None:
    room.mkdir()


def _a_checkpoint(room: Path) -> None:
    room.mkdir()
    _save(room / "c", 1)


def _a_cut_between_the_renames(room: Path) -> None:
    """The only good checkpoint is `.old`; a half `.new` is beside it."""
    _a_checkpoint(room)
    (room / "c").rename(room / ".c.old")
    (room / ".c.new").mkdir()
    (room / ".c.new" / saved.TENSORS).write_text("half")


def _two_cuts_in_a_row(room: Path) -> None:
    """One save was cut while it removed `.old`, the next one while it wrote `.new`."""
    _a_cut_between_the_renames(room)
    shutil.copytree(room / ".c.old", room / "c")
    (room / ".c.old" / saved.DOCUMENT).unlink()


STARTS = {
    made.__name__.strip("_"): made
    for made in (_nothing, _a_checkpoint, _a_cut_between_the_renames, _two_cuts_in_a_row)
}


# When a save is killed: a clock runs it in a child and kills that at the n-th tick.


def _fork(body: Callable[[], None]) -> int:
    """Run `body` in a child, which ends with it."""
    if child := os.fork():
        return child
    try:
        body()
        os._exit(0)
    finally:  # only an exception comes here
        traceback.print_exc()
        os._exit(1)


def _finished(child: int, by: signal.Signals = signal.SIGKILL) -> bool:
    """Wait for a child: True where it came to its end, False where the signal took it."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == by, status
        return False
    assert status == 0, status
    return True


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_lines(save: Callable[[], None], tick: int) -> bool:
    """Ticks: every line of condmod/serialization.py, and every return from there."""
    ticks = itertools.count()

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename != saved.__file__:
            return None
        if event != "call" and next(ticks) == tick:
            _die()
        return trace

    def body() -> None:
        sys.settrace(trace)
        save()

    return _finished(_fork(body))


def _at_operations(save: Callable[[], None], tick: int) -> bool:
    """Ticks: whatever the interpreter opens, makes, lists, renames or removes, libraries too."""
    ticks = itertools.count()

    def hook(event: str, arguments: Any) -> None:
        if event.startswith(("open", "os.", "shutil.")) and next(ticks) == tick:
            _die()

    def body() -> None:
        sys.addaudithook(hook)
        save()

    return _finished(_fork(body))


TRACEME, PEEKUSER, POKEUSER, SYSCALL = 0, 3, 6, 24  # of sys/ptrace.h
CALL, LENGTH, RESULT, WRITE = 15 * 8, 12 * 8, 10 * 8, 1  # of x86-64: orig_rax, rdx, rax; write(2)
NEW_NAMESPACE, NEW_USER, PRIVATE = 0x20000, 0x10000000, 1 << 18 | 1 << 14  # of sched.h, mount.h


class RefusedError(Exception):
    """What a scenario needs is not to be had here."""


@functools.cache
def _libc() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise RefusedError("the numbers of its calls are Linux's")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    return libc


def _traced(save: Callable[[], None]) -> int:
    """A child that stops before it saves, and then before and after every system call."""
    libc = _libc()

    def body() -> None:
        if libc.ptrace(TRACEME, 0, None, None) == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            save()

    child = _fork(body)
    if not os.WIFSTOPPED(os.waitpid(child, 0)[1]):
        raise RefusedError("a process may not trace its child")
    return child


def _stops(child: int) -> bool:
    """Let a traced child run to its next stop; False where it came to its end."""
    assert _libc().ptrace(SYSCALL, child, None, None) == 0
    status = os.waitpid(child, 0)[1]
    assert os.WIFSTOPPED(status) or status == 0, status
    return os.WIFSTOPPED(status)


def _system_calls(child: int) -> Iterator[None]:
    """Stop a traced child before each of its system calls."""
    while _stops(child):
        yield
        if not _stops(child):
            return


def _killed(child: int) -> bool:
    os.kill(child, signal.SIGKILL)
    return _finished(child)


def _at_system_calls(save: Callable[[], None], tick: int) -> bool:
    """Ticks: every system call, so those of safetensors too."""
    child = _traced(save)
    for number, _ in enumerate(_system_calls(child)):
        if number == tick:
            return _killed(child)
    return True


CLOCKS = {
    clock.__name__.strip("_"): clock for clock in (_at_lines, _at_operations, _at_system_calls)
}


# The scenarios, which run in the helper: each returns what is to be counted.


def kill_everywhere(room: Path, start: str, clock: str) -> dict[str, int]:
    """Kill a save at every tick of a clock; after each, load, compare and save again."""
    origin = room / "origin"
    STARTS[start](origin)
    before = None if start == "nothing" else 1
    found: list[int | None] = []
    for tick in itertools.count():
        folder = room / str(tick) / "c"
        shutil.copytree(origin, folder.parent)
        finished = CLOCKS[clock](lambda folder=folder: _save(folder, 2), tick)
        if finished:
            _assert_tidy(folder)
        found.append(_step(folder))
        _assert_saves_again(folder, 3)
        shutil.rmtree(folder.parent)
        if finished:
            break
    assert set(found) == {before, 2}, found
    return {"kills": len(found) - 1, "found the one before": found.count(before)}


def _shape(room: Path) -> frozenset[tuple[str, int]]:
    """What lies in a room: folders, and files with their sizes; temporary names are made equal."""
    shape = set()
    for folder, _, files in os.walk(room):
        inside = folder[len(str(room)) :]
        shape.add((inside, -1))
        for file in files:
            size = os.stat(f"{folder}/{file}").st_size
            shape.add((f"{inside}/{re.sub('^[.]tmp.*', '.tmp', file)}", size))
    return frozenset(shape)


def kill_again_and_again(room: Path) -> dict[str, int]:
    """Kill saves after every change on the disk, from whatever kills left, until nothing is new."""
    first, work = room / "0", room / "work"
    folder = work / "c"
    _a_checkpoint(first)
    seen, todo, kills = {_shape(first)}, [first], 0

    def killed(step: int, tick: int) -> bool:
        child, last, changes = _traced(lambda: _save(folder, step)), _shape(work), itertools.count()
        for _ in _system_calls(child):
            if (shape := _shape(work)) != last and next(changes) == tick:
                return _killed(child)
            last = shape
        return True

    while todo:
        origin = todo.pop(0)
        shutil.copytree(origin, work)
        before = _step(folder)  # of a copy, for a load may rename
        assert before is not None
        finished = False
        for tick in itertools.count():
            shutil.rmtree(work)
            if finished:
                break
            shutil.copytree(origin, work)
            finished = killed(before + 1, tick)
            kills += not finished
            if (shape := _shape(work)) not in seen:
                seen.add(shape)
                todo.append(room / str(len(seen)))
                shutil.copytree(work, todo[-1])
            assert _step(folder) in {before, before + 1}, (tick, shape)
        assert shape == _shape(first), shape  # of the save that came to its end
    return {"kills": kills, "states": len(seen)}


SIZES = {"large tensors": Size(5000, 10), "a large document": Size(10, 5000)}


def kill_at_a_size(room: Path, size: str) -> dict[str, int]:
    """Let the kernel kill a save where a file of it grows beyond a size: SIGXFSZ."""
    folder = room / "c"
    _save(folder, 1, SIZES[size])
    largest = max(path.stat().st_size for path in folder.iterdir())
    kills, cut = 0, 0
    for limit in [*range(0, largest, largest // 30), largest - 1, largest]:

        def limited(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python itself ignores it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            _save(folder, 2, SIZES[size])

        if _finished(_fork(limited), by=signal.SIGXFSZ):
            assert (limit, _step(folder)) == (largest, 2)
            _assert_tidy(folder)
            continue
        kills += 1
        left = {path.name: path.stat().st_size for path in (room / ".c.new").iterdir()}
        cut += 0 < left.get(saved.DOCUMENT, 0) == limit
        assert _step(folder) == 1, limit
        _assert_saves_again(folder, 3)
        _save(folder, 1, SIZES[size])
    return {"kills": kills, "inside the document": cut}


def kill_inside_a_write(room: Path) -> dict[str, int]:
    """Let each write of a save write only some of its bytes, and kill before it can go on."""
    if platform.machine() != "x86_64":
        raise RefusedError("the registers are x86-64's")
    folder, libc = room / "c", _libc()
    for turn in itertools.count():
        number, part = divmod(turn, 16)
        _save(folder, 1)
        child = _traced(lambda: _save(folder, 2))
        writes = itertools.count()
        for _ in _system_calls(child):
            if libc.ptrace(PEEKUSER, child, CALL, None) == WRITE and next(writes) == number:
                length = libc.ptrace(PEEKUSER, child, LENGTH, None) * part // 16
                assert libc.ptrace(POKEUSER, child, LENGTH, length) == 0
                assert _stops(child)
                assert libc.ptrace(PEEKUSER, child, RESULT, None) == length
                break
        else:
            return {"kills": turn, "writes": number}
        _killed(child)
        assert _step(folder) == 1, (number, part)
        _assert_saves_again(folder, 3)
    raise AssertionError


def kill_at_random(room: Path, kills: int) -> dict[str, int]:
    """Kill a process that only saves, at random times; what it told as saved is never lost."""
    folder, size, times = room / "c", Size(50_000, 1000), random.Random(0)
    _save(folder, 1, size)
    step, inside = 1, 0
    for _ in range(kills):
        reader, writer = os.pipe()

        def endless(step: int = step, reader: int = reader, writer: int = writer) -> None:
            os.close(reader)  # so that it ends by itself if nobody is there to kill it
            for further in itertools.count(step + 1):
                _save(folder, further, size)
                os.write(writer, further.to_bytes(8, "little"))

        child = _fork(endless)
        os.close(writer)
        told = os.read(reader, 8)
        time.sleep(times.uniform(0, 0.03))
        _killed(child)
        while more := os.read(reader, 8):  # less than a pipe holds back
            told = more
        os.close(reader)
        inside += len(os.listdir(room)) > 1
        last, found = int.from_bytes(told, "little"), _step(folder)
        assert found in {last, last + 1}, (last, found)
        assert found is not None
        assert found > step
        step = found
    _assert_saves_again(folder, step + 1)
    return {"kills": kills, "inside a save": inside, "saves": step}


def _mount_small_disk(folder: Path) -> str:
    """Mount a small file system that ends with this process; the reason where that is refused."""
    libc, user, group = _libc(), os.getuid(), os.getgid()
    if libc.unshare(NEW_NAMESPACE):
        if libc.unshare(NEW_NAMESPACE | NEW_USER):
            return f"a process may have no mounts of its own: {os.strerror(ctypes.get_errno())}"
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", b"/", None, PRIVATE, None) or libc.mount(
        b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=1m,nr_inodes=100"
    ):
        return f"a tmpfs cannot be mounted: {os.strerror(ctypes.get_errno())}"
    return ""


def fill_the_disk(room: Path, what: str) -> dict[str, Any]:
    """Save where only so many pages, or files, are left; more and more, until it fits."""
    _libc()
    disk, result = room / "disk", room / "result.json"
    disk.mkdir()

    def fill() -> None:
        if refused := _mount_small_disk(disk):
            result.write_text(json.dumps({"refused": refused}))
            return
        size, lines, folder = Size(4000, 3000), [], disk / "checkpoints" / "c"
        ballast = disk / "ballast"
        for left in itertools.count():
            _save(folder, 1)
            ballast.mkdir()
            if what == "pages":
                free = os.statvfs(disk)
                (ballast / "0").write_bytes(bytes((free.f_bfree - left) * free.f_bsize))
            else:
                for number in range(os.statvfs(disk).f_ffree - left):
                    (ballast / str(number)).touch()
            try:
                _save(folder, 2, size)
            except OSError as error:
                lines.append(str(error).replace(str(disk), "DISK"))
            else:
                break
            _assert_tidy(folder)
            assert _step(folder) == 1, left
            shutil.rmtree(ballast)
            _assert_saves_again(folder, 3)
        assert _step(folder) == 2
        result.write_text(json.dumps({"stops": len(lines), "lines": sorted(set(lines))}))

    assert _finished(_fork(fill))
    return dict(json.loads(result.read_text()))


def limit_the_files(room: Path, size: str) -> dict[str, Any]:
    """Save under a limit on the size of files that stops a write, and does not kill."""
    folder, lines = room / "c", set()
    _save(folder, 1, SIZES[size])
    largest = max(path.stat().st_size for path in folder.iterdir())
    former, stops = resource.getrlimit(resource.RLIMIT_FSIZE), 0
    for limit in [*range(0, largest, largest // 30), largest - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
        try:
            _save(folder, 2, SIZES[size])
        except OSError as error:
            stops += 1
            lines.add(str(error).replace(str(room), "DISK"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
        _assert_tidy(folder)
        assert _step(folder) == 1, limit
    _assert_saves_again(folder, 2)
    return {"stops": stops, "lines": sorted(lines)}


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        kill_everywhere,
        kill_again_and_again,
        kill_at_a_size,
        kill_inside_a_write,
        kill_at_random,
        fill_the_disk,
        limit_the_files,
    )
}


def _serve() -> None:
    """Run the scenarios that standard input asks for, a line each; answer by a line each."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        name, room, arguments = json.loads(line)
        try:
            reply = SCENARIOS[name](Path(room), *arguments)
        except RefusedError as refused:
            reply = {"refused": str(refused)}
        except Exception:  # noqa: BLE001 - the test that asked shows it
            reply = {"failed": traceback.format_exc()}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


# The promises.


@pytest.fixture(scope="module")
def helper() -> Iterator[subprocess.Popen[str]]:
    """The process that forks what is killed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # larger pages: a fork takes half the time
    }
    with subprocess.Popen(
        [sys.executable, __file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


@pytest.fixture
def scenario(
    helper: subprocess.Popen[str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> Callable[..., dict[str, Any]]:
    """Let the helper run a scenario, and keep what it counted in the report."""

    def run(name: str, *arguments: object) -> dict[str, Any]:
        assert helper.stdin is not None
        assert helper.stdout is not None
        helper.stdin.write(json.dumps([name, str(tmp_path), arguments]) + "\n")
        helper.stdin.flush()
        reply = dict(json.loads(helper.stdout.readline() or '{"failed": "the helper ended"}'))
        if "refused" in reply:
            pytest.skip(reply["refused"])
        if "failed" in reply:
            pytest.fail(reply["failed"], pytrace=False)
        for key, value in reply.items():
            record_property(key, value)
        sys.stdout.write(f"{name} {arguments}: {reply}\n")  # pytest -rP shows it
        return reply

    return run


@pytest.mark.parametrize(
    ("clock", "start", "least"),
    [
        ("at_lines", "a_checkpoint", 60),
        ("at_lines", "a_cut_between_the_renames", 60),
        ("at_operations", "a_checkpoint", 15),
        ("at_operations", "a_cut_between_the_renames", 15),
        ("at_operations", "two_cuts_in_a_row", 15),
        ("at_system_calls", "nothing", 25),
        ("at_system_calls", "a_checkpoint", 35),
    ],
)
def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint_and_the_next_save_is_tidy(
    scenario: Callable[..., dict[str, Any]], clock: str, start: str, least: int
):
    assert scenario("kill_everywhere", start, clock)["kills"] >= least


def test_saves_killed_one_after_the_other_in_any_order_leave_a_whole_checkpoint(
    scenario: Callable[..., dict[str, Any]],
):
    counted = scenario("kill_again_and_again")
    assert counted["kills"] >= 200
    assert counted["states"] >= 15


@pytest.mark.parametrize(("size", "inside"), [("large tensors", 0), ("a large document", 25)])
def test_a_save_that_the_kernel_kills_at_a_file_s_size_leaves_the_one_before(
    scenario: Callable[..., dict[str, Any]], size: str, inside: int
):
    counted = scenario("kill_at_a_size", size)
    assert counted["kills"] >= 30
    assert counted["inside the document"] >= inside


def test_a_save_killed_with_a_file_half_written_leaves_the_one_before(
    scenario: Callable[..., dict[str, Any]],
):
    counted = scenario("kill_inside_a_write")
    assert counted["writes"] >= 2  # of the tensors and of the document
    assert counted["kills"] == 16 * counted["writes"]


def test_a_process_killed_at_random_times_loses_nothing_that_it_told_as_saved(
    scenario: Callable[..., dict[str, Any]],
):
    assert scenario("kill_at_random", 50)["saves"] > 50


@pytest.mark.parametrize(("what", "least"), [("pages", 6), ("files", 3)])
def test_a_full_disk_stops_with_a_clear_line_and_keeps_the_one_before(
    scenario: Callable[..., dict[str, Any]], what: str, least: int
):
    counted = scenario("fill_the_disk", what)
    assert counted["stops"] >= least
    for line in counted["lines"]:
        assert re.fullmatch(r".*No space left on device.*", line)
        assert "DISK/checkpoints/" in line


@pytest.mark.parametrize("size", SIZES)
def test_a_file_that_may_not_grow_stops_with_a_clear_line_and_keeps_the_one_before(
    scenario: Callable[..., dict[str, Any]], size: str
):
    counted = scenario("limit_the_files", size)
    assert counted["stops"] >= 30
    for line in counted["lines"]:
        assert re.fullmatch(r".*File too large.*", line)
        assert "DISK/" in line


Log = list[tuple[str, str, Any]]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    """What is synced in tmp_path, and what it holds then; what is renamed and removed there."""
    log: Log = []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        (path,) = (
            path
            for path in (tmp_path, *tmp_path.rglob("*"))
            if os.path.samestat(path.stat(), status)
        )
        log.append(("sync", str(path.relative_to(tmp_path)), _held(path)))

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        log.append(("rename", source.name, target.name))

    def removed(folder: Path, **options: Any) -> None:
        if folder.exists():
            log.append(("remove", folder.name, None))
        rmtree(folder, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    return log


def _held(path: Path) -> Any:
    return path.read_bytes() if path.is_file() else sorted(os.listdir(path))


def test_all_is_synced_before_it_is_renamed_and_the_parent_before_the_former_is_removed(
    tmp_path: Path, log: Log
):
    folder = tmp_path / "c"
    _save(folder, 1)
    first = log.copy()
    log.clear()
    _save(folder, 2)
    aside = {f".c.new/{saved.TENSORS}", f".c.new/{saved.DOCUMENT}", ".c.new"}
    for events in (first, log):
        assert {path for what, path, _ in events[:3] if what == "sync"} == aside
    assert first[3:] == [("rename", ".c.new", "c"), ("sync", ".", ["c"])]
    assert log[3:] == [
        ("rename", "c", ".c.old"),
        ("rename", ".c.new", "c"),
        ("sync", ".", [".c.old", "c"]),
        ("remove", ".c.old", None),
    ]
    for _, path, held in log[:3]:  # nothing is written after it was synced
        assert held == _held(tmp_path / path.replace(".c.new", "c"))


@pytest.mark.parametrize("number", range(3))
def test_a_disk_that_is_found_full_at_a_sync_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    folder, syncs, fsync = tmp_path / "c", itertools.count(), os.fsync
    _save(folder, 1)

    def full(descriptor: int) -> None:
        if next(syncs) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        _save(folder, 2)
    assert caught.value.filename == str(folder)
    assert _step(folder) == 1
    _assert_tidy(folder)


if __name__ == "__main__":
    _serve()
