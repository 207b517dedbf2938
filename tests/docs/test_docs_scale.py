"""The page about scale shows a loop that runs, and the numbers that were measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from condmod.serialization import load_checkpoint

ROOT = Path(__file__).parents[2]
LOOP = ROOT / "examples" / "own_loop.py"
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    def run(how):
        folder = tmp_path_factory.mktemp(how) / "kept"
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(LOOP)]
        done = subprocess.run(
            [sys.executable, *command, str(folder), how],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"trained on 2 processes by {how}, and kept {folder}\n"
        return load_checkpoint(folder).tensors

    return {how: run(how) for how in ("ddp", "fsdp2")}


def test_the_page_shows_the_loop():
    assert f"--8<--\n{LOOP.relative_to(ROOT)}\n--8<--" in PAGE


def test_a_loop_of_ones_own_learns_the_same_by_ddp_and_by_fsdp2(trained):
    ddp, fsdp2 = trained["ddp"], trained["fsdp2"]
    assert ddp.keys() == fsdp2.keys()
    assert any(name.startswith("bank.") for name in ddp)
    for name, value in ddp.items():
        torch.testing.assert_close(fsdp2[name], value, rtol=1e-4, atol=1e-6)


def test_the_table_is_what_the_benchmark_has_found():
    found = json.loads((ROOT / "benchmarks" / "results" / "sharding.json").read_text())
    for row in found["rows"]:
        assert (
            f"| {row['way']} | {row['generators_mib']:.0f} | {row['rest_mib']:.0f} | "
            f"{row['peak_rss_growth_mib']:.0f} | {row['median_s']:.1f} "
            f"({row['best_s']:.1f} to {row['worst_s']:.1f}) |\n"
        ) in PAGE
    assert len({round(row["loss"], 4) for row in found["rows"]}) == 1
