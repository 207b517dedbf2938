"""Where the kernels run, and their tests by Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from condmod.functional import kernels

HERE = Path(__file__).parent / "kernels"


def python(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    others = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, args)],
        env=others | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU, in this process")
@pytest.mark.parametrize("file", sorted(HERE.glob("test_*.py")), ids=lambda file: file.stem)
def test_the_kernels_pass_by_the_interpreter(file):
    """In a process of its own: triton must not be imported before it is told to interpret."""
    pytest_options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = python("-m", "pytest", *pytest_options, file, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kernels_compile_for_a_gpu_read_16_bytes_at_once_and_have_no_atomics(tmp_path):
    done = python(HERE / "build_for_gpu.py", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == {
        "forward_tile",
        "backward_tile",
        "sum_positions",
        "channel_statistics",
        "line_statistics",
        "line_moments",
    }
    assert all(row["binary"] for row in rows)
    assert {row["read_bits"] for row in rows} == {128}
    assert {row["atomics"] for row in rows} == {0}


def test_importing_the_kernels_needs_no_triton():
    done = python(
        "-c",
        "import sys; sys.modules['triton'] = None; import condmod.functional.kernels as kernels; "
        "print(kernels.norm_affine.__name__)",
    )
    assert (done.stdout, done.stderr) == ("norm_affine\n", "")


def test_what_is_missing_is_said(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels.unavailable(gpu) == ""
    assert kernels.unavailable(cpu) == (
        "triton kernels run on a GPU, the features are on cpu; move them, or set "
        "TRITON_INTERPRET=1 before triton is imported to try them slowly"
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.unavailable(cpu) == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels.unavailable(gpu) == "triton is not installed; pip install 'condmod[triton]'"
