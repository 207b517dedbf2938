"""FSDP2 on two gloo processes: the published start comes back on sharded parameters."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import condmod

DETERMINISTIC = [
    "film(init='identity')",
    "dense_film(init='identity', residual=True)",
    "adaln_zero(init='identity')",
    "concat_project(init='identity')",
    "ada_group_norm(groups=4, init='identity')",
    "adaln(init='identity')",
    "adaln_single(init='identity')",
    "cogvideox(init='identity')",
    "diffusion_policy_film(cond_predict_scale=True, init='identity')",
    "gnn_film(init='identity')",
    "lumina",
    "pi05(init='identity')",
    "stylegan2(init='identity')",
    "tanh_gate(per_channel=True)",
    "zero_conv",
]
DRAWN = ["film", "dense_film", "concat_project", "timestep_table(steps=8)"]
DRAWN += ["adaln_single", "af3_adaln", "biggan_batch_norm", "cnaps", "cosmos", "edm2", "film_block"]
DRAWN += ["conditional_batch_norm(classes=8)", "modern_batch_norm", "stable_audio", "wan"]
DRAWN += ["spade(hidden=8)", "squeeze_excite", "tfilm", "tvfilm", "gpocm", "wavenet_gate"]
DRAWN += ["stylegan2", "hypernetwork", "conditional_conv", "cross_attention(heads=2)"]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def build(spec):
    own = condmod.configure(spec).component.kinds & {"raw", "self"}
    return condmod.create_bank(spec, {"here": condmod.Site(8, None if own else 6)})


def run(rank, store, failures):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for spec in (*DETERMINISTIC, *DRAWN):
        torch.manual_seed(0)
        want = build(spec).state_dict()
        with torch.device("meta"):
            module = build(spec)
        fully_shard(module)
        module.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(7.0)
        torch.manual_seed(0)
        module.reset_parameters()
        for name, value in module.state_dict().items():
            got = whole(value)
            if (got == 7.0).any() or (spec in DETERMINISTIC and not torch.equal(got, want[name])):
                failures.append(f"{spec}: {name} on rank {rank}")
    dist.barrier()  # a process that leaves first has ended the other's connections
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_reset_parameters_fills_sharded_parameters(tmp_path):
    with mp.Manager() as manager:
        failures = manager.list()
        mp.spawn(run, (tmp_path / "store", failures), nprocs=2)
        assert not list(failures)
