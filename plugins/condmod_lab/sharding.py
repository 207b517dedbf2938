"""Parameters shared out over processes by FSDP2: each holds a part, and all while it needs them.

Source: Zhao et al. 2023, arXiv:2304.11277; `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from condmod import Modulator, SiteError
from condmod_lab.network import Network


def shard(net: Network, mesh: DeviceMesh) -> None:
    """Turn a network's parameters into DTensors, shared out over the processes of a mesh.

    Every block is a unit, whose parameters are gathered while it runs, and so is the bank. A
    modulator with parameters that are used after it has generated is called by its block, when the
    bank has let go of its own; so it is a unit, too.

    Raises:
        SiteError: a parameter is a scalar, which has no dimension to be shared out along.
    """
    for name, parameter in net.named_parameters():
        if parameter.ndim == 0:
            raise SiteError(
                f"training.sharding shares parameters out along their first dimension, and {name} "
                "is a scalar; give it the shape (1,), or set training.sharding to none"
            )
    # Nothing here writes in place into what a unit has returned.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    body = net.body
    for modulator in (body.bank[name] for name in body.bank):
        if modulator.site_params:
            fully_shard(modulator, mesh=mesh)
            applied = "modulate" if isinstance(modulator, Modulator) else "around"
            for method in ("generate", applied):
                register_fsdp_forward_method(modulator, method)
    for unit in (body.bank, *body.blocks, net):  # the whole last: it takes what is left
        fully_shard(unit, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is shared out, every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """All of each tensor, on the CPU, or nothing; gathered one by one, as devices may be small."""
    gathered = ((name, whole(value)) for name, value in tensors.items())
    return {name: value.cpu() for name, value in gathered if keep}


def part_of(tensor: Tensor, held: Tensor | None) -> Tensor:
    """This process's part of a whole tensor that is to replace the one that is held."""
    if not isinstance(held, DTensor) or tensor.shape != held.shape:
        return tensor
    mesh, placements = held.device_mesh, held.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
