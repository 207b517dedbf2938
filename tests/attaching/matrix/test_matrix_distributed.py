"""Two gloo processes, replicated (DDP) and sharded (FSDP2), do what one process does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

GROUP = "Many processes"
SCRIPT = Path(__file__).with_name("two_processes.py")
WAYS = {
    "by_argument": "`conditioned(x, condition=c)`",
    "by_context": "`with conditioned.condition(c):` around the bare base",
}
MORE = {
    "absent": "DDP and FSDP2 with a process on which every condition is absent",
    "fsdp-attached-late": "FSDP2: a base sharded before it is attached to",
    "fsdp-compiled": "FSDP2 with blocks compiled in place",
    "fsdp-saved-and-loaded": "FSDP2: sharded saving and loading of bank and optimiser, "
    "`torch.distributed.checkpoint`",
    "fsdp-gathered": "FSDP2: the whole bank gathered into one process",
    "fsdp-mixed-precision": "FSDP2 with `MixedPrecisionPolicy(param_dtype=torch.bfloat16)`",
    "fsdp-one-root": "FSDP2 with the conditioned model as the one root, as libraries shard",
}


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """The names of the checks that have passed."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    folder = tmp_path_factory.mktemp("sharded")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    done = subprocess.run(
        [sys.executable, *command, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return {line.removeprefix("passed ") for line in done.stdout.splitlines()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_replicas_equal_one_process(cell, passed, way, checkpointed):
    under = "-checkpointed" if checkpointed else ""
    assert f"ddp-{way}{under}" in passed
    how = ", with checkpoints" if checkpointed else ""
    cell(GROUP, f"DDP, {WAYS[way]}{how}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_shards_equal_one_process(cell, passed, way, checkpointed):
    under = "-checkpointed" if checkpointed else ""
    assert f"fsdp-{way}{under}" in passed
    how = ", with checkpoints" if checkpointed else ""
    cell(GROUP, f"FSDP2, {WAYS[way]}{how}")


@pytest.mark.parametrize("name", MORE)
def test_what_sharding_comes_with(cell, passed, name):
    assert name in passed
    cell(GROUP, MORE[name])


def test_a_base_below_one_root_is_refused_alone(cell, passed):
    assert "fsdp-one-root-refuses-context" in passed
    cell(
        GROUP,
        "FSDP2 with the conditioned model as the one root, `with conditioned.condition(c):` "
        "around the bare base",
        refused="torch gathers the root's parameters in the root's forward alone; shard base and "
        "bank as roots of their own",
    )
