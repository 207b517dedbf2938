"""A training loop of one's own, on any number of processes: DDP, or FSDP2 where asked for.

torchrun --nproc-per-node 2 examples/own_loop.py runs/own_loop [fsdp2]
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import condmod
from condmod.serialization import save_checkpoint

WIDTH, BATCH, STEPS = 32, 8, 5


class Net(nn.Module):
    """Blocks that a time steers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = condmod.create_encoder("timestep(hidden=[64])", out_dim=64)
        sites = {f"blocks.{index}": condmod.Site(WIDTH, 64) for index in range(3)}
        self.bank = condmod.create_bank("adaln(affine=True)", sites)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in sites
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Features (B, WIDTH) and times (B,) to features."""
        modulations = self.bank(self.encoder(t))  # called, as FSDP2 gathers around calls
        for name, block in zip(self.bank, self.blocks, strict=True):
            x = x + block(self.bank[name].modulate(x, modulations[name]))
        return x


def shard(net: Net, device: str) -> None:
    """Share out every parameter over all processes."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for modulator in (net.bank[name] for name in net.bank):
        if modulator.site_params:  # used by `modulate`, when the bank's are no longer gathered
            fully_shard(modulator, mesh=mesh)
            for method in ("generate", "modulate"):
                register_fsdp_forward_method(modulator, method)
    for unit in (net.bank, *net.blocks, net):  # the whole network last
        fully_shard(unit, mesh=mesh)


def main(folder: str, how: str = "ddp") -> None:
    """Train on as many processes as torchrun has started, and keep the result."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.manual_seed(0)  # every process begins with the same weights
    net = Net().to(device)
    model: nn.Module = net
    if how == "fsdp2":
        shard(net, device)
    else:
        model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)  # of what is there after sharding
    for step in range(STEPS):
        torch.manual_seed(step)  # all draw the whole batch, and each takes its share
        x, t = torch.randn(BATCH, WIDTH), torch.randint(1000, (BATCH,))
        x, t = x[rank::processes].to(device), t[rank::processes].to(device)
        loss = (model(x, t) + x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(net, options=whole)  # all processes ask, the first is given
    if rank == 0:
        save_checkpoint(folder, tensors, {"step": STEPS})
        print(f"trained on {processes} processes by {how}, and kept {folder}")
    dist.barrier()  # nobody leaves while another still sends or saves
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
