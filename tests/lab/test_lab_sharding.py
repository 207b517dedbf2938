"""Sharded networks of all mechanisms do what whole ones do; what cannot be sharded is refused."""

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from condmod import SiteError
from condmod_lab.config import TrainConfig
from condmod_lab.network import build
from condmod_lab.sharding import gather, part_of, shard

Tiny = Callable[..., TrainConfig]

OWN_ENCODER = (
    "multi_condition(inner=ada_group_norm(groups=4), encoder=fuse(inputs={'time': "
    "timestep(dim=64, scale=1000.0), 'label': label(classes=10, nullable=True)}))"
)
MORE = ["adaln(affine=True)", "ada_group_norm(groups=4)", "adaln_zero(parts=1)", OWN_ENCODER]
EVERY = """
    import copy
    import sys

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import condmod
    from condmod_lab.config import make_config
    from condmod_lab.network import build
    from condmod_lab.sharding import gather, shard

    dist.init_process_group("gloo")
    rank, mesh, fitting = dist.get_rank(), init_device_mesh("cpu", (2,)), []
    small = {"name": "transformer", "channels": 8, "blocks": 2, "condition_dim": 8}
    for spec in (*condmod.list_modulators(), *sys.argv[1:]):
        torch.manual_seed(0)
        try:
            net = build(make_config({"modulator": spec, "backbone": small}), 10, (1, 8, 8)).train()
        except condmod.CondmodError:
            continue
        fitting.append(spec)
        with torch.no_grad():  # away from starts that close a branch
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        inputs = torch.randn(8, 1, 8, 8), torch.rand(8), torch.arange(8), torch.arange(8) % 3 > 0
        part = [value[4 * rank : 4 * rank + 4] for value in inputs]
        one = copy.deepcopy(net)
        shard(net, mesh)
        for _ in range(2):  # a second pass meets what the first has left
            outputs = [each(*part) for each in (net, one)]
            for output in outputs:
                output.square().mean().backward()
        torch.testing.assert_close(*outputs)
        learning = {name: p for name, p in net.named_parameters() if p.requires_grad}
        grads = gather({name: value.grad for name, value in learning.items()})
        for name, value in one.named_parameters():
            if value.requires_grad:
                dist.all_reduce(value.grad)
                torch.testing.assert_close(grads[name], value.grad / 2, msg=f"{spec}: {name}")
    print("fitting", len(fitting), *fitting[-len(sys.argv[1:]) :], sep="|")
    dist.destroy_process_group()
"""


def test_every_mechanism_gives_the_same_sharded_as_whole(tmp_path: Path) -> None:
    """Outputs and gradients, of modulators whose blocks use their parameters, too."""
    script = tmp_path / "every.py"
    script.write_text(textwrap.dedent(EVERY))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [sys.executable, *command, *MORE], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines() if line.startswith("fitting")]
    assert len(lines) == 2
    for _, count, *last in lines:
        assert int(count) > 30
        assert last == MORE


@pytest.fixture
def mesh_of_one() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_parameters_become_dtensors_and_come_back_whole(
    tiny: Tiny, mesh_of_one: DeviceMesh
) -> None:
    net = build(tiny(), 10, (1, 8, 8))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    shard(net, mesh_of_one)
    held = net.state_dict()
    assert all(isinstance(value, DTensor) for value in held.values())
    after = gather(held)
    assert not any(isinstance(value, DTensor) for value in after.values())
    assert all(value.equal(after[name]) for name, value in before.items())
    for name, value in before.items():
        part = part_of(value, held[name])
        assert isinstance(part, DTensor)
        assert part.placements == held[name].placements
    assert gather(held, keep=False) == {}


def test_a_scalar_parameter_cannot_be_shared_out(tiny: Tiny, mesh_of_one: DeviceMesh) -> None:
    net = build(tiny(), 10, (1, 8, 8))
    net.body.exit.gain = nn.Parameter(torch.ones(()))
    with pytest.raises(SiteError) as caught:
        shard(net, mesh_of_one)
    assert str(caught.value) == (
        "training.sharding shares parameters out along their first dimension, and body.exit.gain "
        "is a scalar; give it the shape (1,), or set training.sharding to none"
    )
    assert not any(isinstance(value, DTensor) for value in net.parameters())
