"""Run by torchrun on two processes: attached models, replicated and sharded, against one process.

Prints the name of every check that has passed, from the first process.
"""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import condmod
from condmod import Signal

ENCODER = "fuse(inputs={'time': timestep(dim=4), 'text': vector(features=6, nullable=True)})"
PATTERNS = {
    "blocks.*.norm": "film",
    "blocks.*.mlp": "adaln_zero",
    "head": ("concat_project", "input"),  # has parameters that are used after it has generated
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def attached(checkpointed=False, **options):
    """The same attached model at every call, with a frozen base and an encoder."""
    torch.manual_seed(0)
    options = options or {"condition_dim": 5, "encoder": ENCODER}
    conditioned = condmod.attach(Net(checkpointed), PATTERNS, **options)
    for parameter in conditioned.bank.parameters():
        nn.init.normal_(parameter, std=0.3)
    return conditioned


def shard(conditioned, **policy):
    """The recipe: blocks, then the base and the bank, each a root of its own."""
    for block in conditioned.base.blocks:
        fully_shard(block, mesh=MESH, **policy)
    fully_shard(conditioned.base, mesh=MESH, **policy)
    fully_shard(conditioned.bank, mesh=MESH, **policy)
    return conditioned


def shard_as_one(conditioned, **policy):
    """Blocks, and the whole as their root, as libraries do; what is left is gathered with it."""
    for block in conditioned.base.blocks:
        fully_shard(block, mesh=MESH, **policy)
    fully_shard(conditioned, mesh=MESH, **policy)
    return conditioned


def batch(part=slice(None)):
    """Features and raw signals; in the second half every text is absent."""
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(4, *shape, generator=generator) for shape in ((4, 8), (6,)))
    present = torch.tensor([True, True, False, False])
    time = torch.tensor([3, 9, 20, 41])
    return x[part], {"time": time[part], "text": Signal(text[part], present=present[part])}


def optimiser(conditioned):
    return torch.optim.AdamW([p for p in conditioned.parameters() if p.requires_grad], lr=0.05)


def train(call, optimise, steps, part=slice(None)):
    """Steps of which each has two forward passes under two conditions before one backward pass."""
    x, condition = batch(part)
    for _ in range(steps):
        optimise.zero_grad()
        one = call(x, condition)
        two = call(x, {**condition, "time": condition["time"] + 5})
        (one.square().mean() + 2 * two.sin().mean()).backward()
        optimise.step()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(conditioned, other):
    """Every parameter and its gradient are those of a model on one process."""
    for one, wanted in zip(conditioned.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(whole(one.detach()), wanted.detach(), rtol=1e-4, atol=1e-6)
        assert (one.grad is None) == (wanted.grad is None) == (not wanted.requires_grad)
        if wanted.grad is not None:
            torch.testing.assert_close(whole(one.grad), wanted.grad, rtol=1e-4, atol=1e-6)


def passed(name):
    dist.barrier()
    if RANK == 0:
        print("passed", name, flush=True)  # noqa: T201  # the test reads it


def by_argument(conditioned, model):
    return lambda x, condition: model(x, condition=condition)


def by_context(conditioned, model):
    def call(x, condition):
        with conditioned.condition(condition):
            return model(x)

    return call


def main(folder):
    assert batch(MINE)[1]["text"].present.any() == (RANK == 0)
    one = attached()
    train(by_argument(one, one), optimiser(one), steps=2)
    for checkpointed in (False, True):
        under = "-checkpointed" if checkpointed else ""
        for way in (by_argument, by_context):
            conditioned = attached(checkpointed)
            replicated = DistributedDataParallel(conditioned)
            train(way(conditioned, replicated), optimiser(conditioned), 2, MINE)
            same(conditioned, one)
            passed(f"ddp-{way.__name__}{under}")

            conditioned = shard(attached(checkpointed))
            assert all(isinstance(p, DTensor) for p in conditioned.parameters())
            model = conditioned if way is by_argument else conditioned.base
            train(way(conditioned, model), optimiser(conditioned), 2, MINE)
            same(conditioned, one)
            passed(f"fsdp-{way.__name__}{under}")

    torch.manual_seed(0)
    base = attached().detach()
    for block in base.blocks:
        fully_shard(block, mesh=MESH)
    fully_shard(base, mesh=MESH)
    passed("absent")  # all of the above, whose second process has no text at all
    late = condmod.attach(base, PATTERNS, condition_dim=5, encoder=ENCODER)
    late.bank.load_state_dict(attached().bank.state_dict())
    fully_shard(late.bank, mesh=MESH)
    train(by_argument(late, late), optimiser(late), 2, MINE)
    same(late, one)
    passed("fsdp-attached-late")

    compiled = shard(attached())
    for block in compiled.base.blocks:
        block.compile(backend="aot_eager")
    train(by_argument(compiled, compiled), optimiser(compiled), 2, MINE)
    same(compiled, one)
    passed("fsdp-compiled")

    save_and_load(folder, one)
    mixed_precision()
    one_root(one)


def save_and_load(folder, one):
    trained = StateDictOptions(ignore_frozen_params=True)
    first = shard(attached(checkpointed=True))
    optimise = optimiser(first)
    train(by_argument(first, first), optimise, 1, MINE)
    model, state = get_state_dict(first, optimise, options=trained)
    assert all(name.startswith("bank.") for name in model)
    assert all(isinstance(tensor, DTensor) for tensor in model.values())
    dcp.save({"model": model, "optimiser": state}, checkpoint_id=folder)

    second = shard(attached(checkpointed=True))
    with torch.no_grad():
        for parameter in second.bank.parameters():
            parameter.zero_()
    optimise = optimiser(second)
    model, state = get_state_dict(second, optimise, options=trained)
    dcp.load({"model": model, "optimiser": state}, checkpoint_id=folder)
    set_state_dict(
        second,
        optimise,
        model_state_dict=model,
        optim_state_dict=state,
        options=StateDictOptions(strict=False),
    )
    train(by_argument(second, second), optimise, 1, MINE)
    same(second, one)
    passed("fsdp-saved-and-loaded")

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(second.bank, options=options)
    if RANK == 0:
        single = attached()
        single.bank.load_state_dict(gathered)
        torch.testing.assert_close(
            list(single.bank.parameters()), list(one.bank.parameters()), rtol=1e-4, atol=1e-6
        )
    passed("fsdp-gathered")


def mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    x, _ = batch(MINE)
    c = torch.linspace(-1, 1, 10).reshape(2, 5)
    single = attached(condition_dim=5)
    expected = single(x, condition=c)
    halves = shard(attached(condition_dim=5), mp_policy=policy)
    output = halves(x, condition=c)
    output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() < 0.05 * expected.norm()
    trained = [p for p in halves.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 for p in trained)
    for bank_alone in (False, True):  # then the root casts the condition before it is checked
        root = attached(condition_dim=5)
        if bank_alone:
            fully_shard(root.bank, mesh=MESH, mp_policy=policy, reshard_after_forward=False)
        shard_as_one(root, mp_policy=policy)
        assert (root(x, condition=c) - expected).norm() < 0.05 * expected.norm()
    passed("fsdp-mixed-precision")


def one_root(one):
    conditioned = shard_as_one(attached(checkpointed=True))
    assert all(isinstance(p, DTensor) for p in conditioned.parameters())
    train(by_argument(conditioned, conditioned), optimiser(conditioned), 2, MINE)
    same(conditioned, one)
    passed("fsdp-one-root")
    x, condition = batch(MINE)
    fresh = shard_as_one(attached())
    refused = pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor")
    with refused, fresh.condition(condition):
        fresh.base(x)
    passed("fsdp-one-root-refuses-context")


if __name__ == "__main__":
    # Nothing here writes in place into what the bank has returned.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    dist.init_process_group("gloo")
    RANK = dist.get_rank()
    MESH = init_device_mesh("cpu", (2,))
    MINE = slice(2 * RANK, 2 * RANK + 2)
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
