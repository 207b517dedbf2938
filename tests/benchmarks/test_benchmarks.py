"""The benchmarks run, and count what they say; how fast anything is, no test asserts."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def run(script, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        ("passes", ["--eager"], {"rows": 60, "calls": 2}),
        ("generation", [], {"stages": 2, "steps": 2}),
    ],
)
def test_a_benchmark_prints_its_rows_and_writes_them(script, arguments, rows, tmp_path):
    file = tmp_path / "found.json"
    said = run(script, "--tiny", "--rounds", "1", "--json", str(file), *arguments)
    found = json.loads(file.read_text())
    assert {part: len(found[part]) for part in rows} == rows
    assert len(said.splitlines()) == sum(rows.values())
    assert {"cpu", "torch", "python", "threads", "allocator", "date"} <= found.keys()
    for part in rows.keys() - {"calls"}:
        for row in found[part]:
            assert all(goal["of"] in row["faster"] for goal in row["goals"])


def test_what_a_gpu_is_to_measure_runs_by_the_interpreter(tmp_path):
    file = tmp_path / "found.json"
    options = ["--tiny", "--rounds", "1", "--json", str(file)]
    said = run("gpu", *options, TRITON_INTERPRET="1")
    rows = json.loads(file.read_text())["rows"]
    assert len(said.splitlines()) == len(rows) == 10
    assert {row["pass"] for row in rows} == {"film", "adaln", "ada_rms", "gate", "joined"}
    for row in rows:
        assert row["errors"].keys() == {"written", "condmod", "condmod triton"}
        assert "condmod triton than written" in row["faster"]


def test_the_attachments_benchmark_runs(benchmark):
    attach = benchmark("attach")
    attach.SHAPES = {(2, 4, 64): 1}
    assert [row["of"] for row in attach.rows(1)] == [
        "attached / by hand",
        "switched off / bare",
    ] * 2


def test_a_wrong_variant_is_not_timed(benchmark):
    passes = benchmark("passes")
    cell = passes.Cell("gate", (2, 4, 8), "global")
    inputs = cell.inputs()
    wanted = [torch.ones_like(value).double() for value in (inputs[0], inputs[0], *inputs)]
    with pytest.raises(AssertionError):
        passes.checked(cell, cell.forms()["condmod"], wanted, inputs)


@pytest.mark.parametrize(
    ("name", "condition", "inference", "training"),
    [("film", "global", 2, 5), ("adaln", "aligned", 4, 9), ("gate", "global", 3, 6)],
)
def test_the_bytes_that_must_be_moved_are_counted(benchmark, name, condition, inference, training):
    cell = benchmark("passes").Cell(name, (2, 4, 8), condition)
    assert (cell.units(training=False), cell.units(training=True)) == (inference, training)


def test_what_the_backward_keeps_is_counted_without_inputs(benchmark):
    x = torch.ones(4, 8, requires_grad=True)
    kept = benchmark("measuring").saved_bytes
    assert kept(lambda: x * x, [x]) == 0
    assert kept(lambda: x.exp() * x.sin(), [x]) == 2 * x.nbytes
    assert kept(lambda: x.exp() * x.sin(), []) == 3 * x.nbytes


def test_a_ratio_says_how_many_times_faster_and_a_small_gap_needs_rounds(benchmark):
    measuring = benchmark("measuring")
    ratio = measuring.faster({"one": [1.0, 2.0, 1.0], "other": [2.0, 4.0, 3.0]}, "one", "other")
    assert ratio == {"ratio": 2.0, "low": 2.0, "high": 3.0}
    assert not measuring.slower({"ratio": 0.9, "low": 0.8, "high": 0.95}, 49)
    assert measuring.slower({"ratio": 0.9, "low": 0.8, "high": 0.95}, 50)
    assert measuring.slower({"ratio": 0.8, "low": 0.7, "high": 0.95}, 11)
    assert not measuring.slower({"ratio": 0.8, "low": 0.7, "high": 1.01}, 50)


def test_the_share_of_other_processes_is_a_share_or_unknown(benchmark):
    with benchmark("measuring").Others() as others:
        sum(range(3_000_000))
    assert others.share is None or 0 <= others.share <= 1


def test_it_is_measured_again_while_others_are_busy(benchmark, monkeypatch):
    measuring = benchmark("measuring")
    shares = iter([0.5, 0.2, 0.3])
    monkeypatch.setattr(measuring.Others, "__exit__", lambda self, *_: self.take())
    monkeypatch.setattr(
        measuring.Others, "take", lambda self: setattr(self, "share", next(shares)), raising=False
    )
    seconds, share = measuring.quietly({"nothing": int}, budget=0.01, rounds=(2, 2))
    assert (len(seconds["nothing"]), share) == (2, 0.2)
    assert next(shares, None) is None
