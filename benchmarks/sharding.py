"""What sharding a conditioned network costs and saves; prints rows, and JSON with --json.

A DiT with DiT-XL's width, cut to 6 blocks: generators (`adaln_zero`) are a third of its parameters.

python benchmarks/sharding.py
"""

import argparse
import json
import os
import platform
import resource
import socket
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import condmod

WIDTH, HEADS, BLOCKS = 1152, 16, 6
BATCH, TOKENS = 4, 64  # of all processes together
ROUNDS, STEPS = 3, 2
MIB = 2**20


class Block(nn.Module):
    """Attention and feed-forward, which a modulator goes around."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def attention(self, x: Tensor) -> Tensor:
        """Every position reads all of its sample."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, modulator: Any, modulation: Any) -> Tensor:
        """Features to features."""
        return modulator.around(x, modulation, self.attention, self.mlp)


class Net(nn.Module):
    """The blocks, and one bank that generates for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        site = condmod.Site(WIDTH, WIDTH)
        self.bank = condmod.create_bank("adaln_zero", {f"block{i}": site for i in range(BLOCKS)})
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Features and condition to features."""
        modulations = self.bank(self.embed(c))
        for name, block in zip(self.bank, self.blocks, strict=True):
            x = block(x, self.bank[name], modulations[name])
        return x


def one_process(net: Net) -> nn.Module:
    """Nothing is shared."""
    return net


def ddp(net: Net) -> nn.Module:
    """A whole copy in every process."""
    return DistributedDataParallel(net)


def fsdp2(net: Net) -> nn.Module:
    """The bank is one unit, as `condmod train` has it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in (net.bank, *net.blocks, net):
        fully_shard(unit, mesh=mesh)
    return net


def fsdp2_by_site(net: Net) -> nn.Module:
    """Every site's generator is a unit of its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in net.bank:
        fully_shard(net.bank[name], mesh=mesh)
        register_fsdp_forward_method(net.bank[name], "generate")
    for unit in (*net.blocks, net):
        fully_shard(unit, mesh=mesh)
    return net


WAYS: dict[str, tuple[Callable[[Net], nn.Module], int]] = {
    "one process": (one_process, 1),
    "DDP": (ddp, 2),
    "FSDP2, the bank one unit": (fsdp2, 2),
    "FSDP2, a unit per site": (fsdp2_by_site, 2),
}


def work(rank: int, way: str, port: int, found: Any) -> None:
    """Train in one of the processes; the first tells what it found."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    wrap, processes = WAYS[way]
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    before = peak()
    torch.manual_seed(0)
    net = Net()
    x, c, target = torch.randn(3, BATCH, TOKENS, WIDTH).unbind()
    share = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    x, c, target = x[share], c[share, 0], target[share]
    model = wrap(net)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    seconds = []
    for _ in range(STEPS + 1):  # the first makes the optimiser's state
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.mse_loss(model(x, c), target)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    held = {"generators": 0, "rest": 0}
    for name, parameter in net.named_parameters():
        part = "generators" if name.startswith("bank.") else "rest"
        held[part] += sum(map(size, (parameter, parameter.grad, *state(optimizer, parameter))))
    mean = loss.detach()
    dist.all_reduce(mean)
    if rank == 0:
        grown = peak() - before
        found.append((way, seconds[1:], held, grown, float(mean) / processes))
    dist.barrier()
    dist.destroy_process_group()


def state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Iterator[Tensor]:
    """What the optimiser holds for a parameter."""
    return iter(optimizer.state[parameter].values())


def size(tensor: Tensor) -> int:
    """Bytes of what this process holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def peak() -> int:
    """The most memory that this process has had at once, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure() -> list[dict[str, Any]]:
    """A row for each way, from interleaved rounds of new processes."""
    with mp.Manager() as manager:
        found = manager.list()
        for _ in range(ROUNDS):
            for way, (_, processes) in WAYS.items():
                mp.spawn(work, (way, free_port(), found), nprocs=processes)
        runs = list(found)
    rows = []
    for way, (_, processes) in WAYS.items():
        own = [run for run in runs if run[0] == way]
        seconds = [second for run in own for second in run[1]]
        rows.append(
            {
                "way": way,
                "processes": processes,
                "generators_mib": own[0][2]["generators"] / MIB,
                "rest_mib": own[0][2]["rest"] / MIB,
                "peak_rss_growth_mib": max(run[3] for run in own) / MIB,
                "median_s": statistics.median(seconds),
                "best_s": min(seconds),
                "worst_s": max(seconds),
                "loss": own[0][4],
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    rows = measure()
    if arguments.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        shape = {"width": WIDTH, "blocks": BLOCKS, "batch": BATCH, "tokens": TOKENS}
        about = {**versions, "date": date.today().isoformat(), **shape}
        print(json.dumps({**about, "rounds": ROUNDS, "steps": STEPS, "rows": rows}, indent=2))
        return
    for row in rows:
        print(
            f"{row['way']:<25} {row['generators_mib']:6.0f} + {row['rest_mib']:.0f} MiB held, "
            f"peak {row['peak_rss_growth_mib']:.0f} MiB, "
            f"{row['median_s']:.2f} s a step ({row['best_s']:.2f} to {row['worst_s']:.2f}), "
            f"loss {row['loss']:.6f}"
        )


if __name__ == "__main__":
    main()
