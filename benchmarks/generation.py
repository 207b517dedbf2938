"""What generating the modulations of all sites costs; prints rows, and writes JSON with --json.

First the stage alone: one generator per site, by condmod's bank and by hand, beside one GEMM over
all sites in three layouts, condmod's schedule, and a bare table of what was generated before. Then
whole passes of a stack of DiT blocks by each of them, and without any conditioning.

python benchmarks/generation.py
"""

import argparse
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import compared, distance, machine, met, quietly
from torch import Tensor, nn
from torch.nn import functional as F

import condmod
from condmod.functional import ScaleShiftGate

STAGES = ((12, 384), (28, 384), (12, 1152), (28, 1152))  # sites and width
BATCHES = (1, 8)
STACK = (12, 384, 6)  # blocks, width and heads, as DiT-S
SIZES = ((1, 16), (1, 256), (8, 64))  # samples and tokens
SCHEDULE = 50  # steps that the table holds
TOLERANCE = 1e-5
Modulations = Sequence[tuple[ScaleShiftGate, ...]]


def bank_of(sites: int, width: int) -> condmod.Bank:
    """AdaLN-Zero at every site, its generators drawn so that nothing is zero."""
    torch.manual_seed(0)
    site = condmod.Site(width, condition_dim=width)
    bank = condmod.create_bank("adaln_zero", {f"blocks.{i}": site for i in range(sites)})
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.02)
    return bank


class Stacked:
    """One GEMM over all sites; `layout` is F.linear, c @ Wt or W @ c.T."""

    def __init__(self, bank: condmod.Bank, layout: str) -> None:
        self.layout, self.sites = layout, len(bank)
        weight = torch.cat([bank[name].proj.weight.detach() for name in bank])
        bias = torch.cat([bank[name].proj.bias.detach() for name in bank])
        self.weight = weight.t().contiguous() if layout == "c @ Wt" else weight
        self.bias = bias[:, None] if layout == "W @ c.T" else bias

    def __call__(self, condition: Tensor) -> Modulations:
        """The modulation of every site."""
        c = F.silu(condition)
        if self.layout == "c @ Wt":
            rows = torch.addmm(self.bias, c, self.weight)
        elif self.layout == "W @ c.T":
            rows = torch.addmm(self.bias, self.weight, c.t()).t().contiguous()
        else:
            rows = F.linear(c, self.weight, self.bias)
        return unpacked(rows, self.sites)


class Table:
    """What every step of a schedule generates, indexed on the device."""

    def __init__(self, bank: condmod.Bank, conditions: Tensor) -> None:
        self.sites = len(bank)
        with torch.no_grad():
            c = F.silu(conditions)
            self.rows = torch.cat([bank[name].proj(c) for name in bank], dim=-1)

    def __call__(self, step: Tensor) -> Modulations:
        """The modulation of every site."""
        return unpacked(self.rows.index_select(0, step), self.sites)


def schedule_of(bank: condmod.Bank, conditions: Tensor) -> condmod.Schedule:
    """What condmod keeps of the same steps, by their number."""
    steps = nn.Embedding.from_pretrained(conditions)
    return condmod.Schedule(nn.Sequential(steps, bank).eval(), torch.arange(SCHEDULE))


def unpacked(rows: Tensor, sites: int) -> Modulations:
    """Rows (B, sites * 6 * C), [shift, scale, gate] twice for each site, as modulations."""
    leaves = rows.unflatten(-1, (6 * sites, -1)).unbind(1)
    pairs = [
        ScaleShiftGate(scale, shift, gate)
        for shift, scale, gate in zip(leaves[0::3], leaves[1::3], leaves[2::3], strict=True)
    ]
    return list(zip(pairs[0::2], pairs[1::2], strict=True))


class Sublayers(nn.Module):
    """Attention and feed-forward of one block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def attention(self, x: Tensor) -> Tensor:
        """Every position reads all of its sample."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Written(nn.Module):
    """DiT's block as it is published: one Linear per block, chunks, and two modulated norms."""

    def __init__(self, sublayers: Sublayers, proj: nn.Linear, width: int) -> None:
        super().__init__()
        self.sublayers = sublayers
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), proj)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens to tokens."""
        rows = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows
        x = x + gate1 * self.sublayers.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.sublayers.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Stack(nn.Module):
    """The same blocks in condmod's two phases, whatever generates."""

    def __init__(self, blocks: Sequence[Sublayers], bank: condmod.Bank) -> None:
        super().__init__()
        self.blocks, self.bank = nn.ModuleList(blocks), bank

    def forward(self, x: Tensor, modulations: Modulations) -> Tensor:
        """Tokens to tokens."""
        for block, name, own in zip(self.blocks, self.bank, modulations, strict=True):
            x = self.bank[name].around(x, own, block.attention, block.mlp)
        return x


class Bare(nn.Module):
    """The blocks without any conditioning."""

    def __init__(self, blocks: Sequence[Sublayers], width: int) -> None:
        super().__init__()
        self.blocks, self.width = nn.ModuleList(blocks), (width,)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        for block in self.blocks:
            x = x + block.attention(F.layer_norm(x, self.width, eps=1e-6))
            x = x + block.mlp(F.layer_norm(x, self.width, eps=1e-6))
        return x


def stage(sites: int, width: int, budget: float, rounds: tuple[int, int]) -> list[dict[str, Any]]:
    """Generation alone, a row for every batch."""
    bank = bank_of(sites, width)
    layouts = [Stacked(bank, layout) for layout in ("F.linear", "c @ Wt", "W @ c.T")]
    return [_stage(bank, layouts, batch, width, budget, rounds) for batch in BATCHES]


def _stage(
    bank: condmod.Bank,
    layouts: Sequence[Stacked],
    batch: int,
    width: int,
    budget: float,
    rounds: tuple[int, int],
) -> dict[str, Any]:
    conditions = torch.randn(SCHEDULE, 1, width).expand(-1, batch, -1)
    table, schedule = Table(bank, conditions[:, 0]), schedule_of(bank, conditions[:, 0])
    step = torch.full((batch,), SCHEDULE // 2)
    condition = conditions[SCHEDULE // 2]
    projections = [bank[name].proj for name in bank]

    def by_site() -> Modulations:
        c = F.silu(condition)
        return [proj(c).chunk(6, dim=-1) for proj in projections]

    ways: dict[str, Callable[[], object]] = {
        "per site": by_site,
        "bank": lambda: list(bank(condition).values()),
        **{layout.layout: partial(layout, condition) for layout in layouts},
        "schedule": lambda: list(schedule(step).values()),
        "table": lambda: table(step),
    }
    with torch.no_grad(), schedule:
        wide = F.silu(condition.double())
        wanted = torch.stack(
            [F.linear(wide, proj.weight.double(), proj.bias.double()) for proj in projections]
        )
        for way in ways.values():
            assert distance(torch.stack(flat(way())), wanted) < TOLERANCE
        seconds, others = quietly(ways, budget=budget, rounds=rounds)
    weights = sum(proj.weight.nbytes for proj in projections)
    return {
        "sites": len(bank),
        "width": width,
        "batch": batch,
        "weights_mib": weights / 2**20,
        "table_mib": table.rows.nbytes / 2**20,
        **told(
            seconds, others, "per site", [("bank than per site", 1.5), ("schedule than bank", 100)]
        ),
        "gbps": {way: weights / median(took) / 1e9 for way, took in seconds.items()},
    }


def flat(modulations: Any) -> list[Tensor]:
    """Every site's rows [shift, scale, gate, ...], (B, 6 * C), whatever form they have."""
    found = []
    for own in modulations:
        if isinstance(own[0], Tensor):
            found.append(torch.cat(list(own), dim=-1))
        else:
            leaves = [leaf for part in own for leaf in (part.shift, part.scale, part.gate)]
            found.append(torch.cat(leaves, dim=-1))
    return found


def steps(
    blocks: int,
    width: int,
    heads: int,
    size: tuple[int, int],
    budget: float,
    rounds: tuple[int, int],
) -> list[dict[str, Any]]:
    """A whole pass in inference, and in training."""
    bank = bank_of(blocks, width)
    sublayers = [Sublayers(width, heads) for _ in range(blocks)]
    batch, tokens = size
    x = torch.randn(batch, tokens, width)
    conditions = torch.randn(SCHEDULE, width)
    step = torch.full((batch,), SCHEDULE // 2)
    condition = conditions[step]
    written = nn.ModuleList(
        Written(own, bank[name].proj, width) for own, name in zip(sublayers, bank, strict=True)
    )
    stack, bare = Stack(sublayers, bank), Bare(sublayers, width)
    table, stacked = Table(bank, conditions), Stacked(bank, "c @ Wt" if batch == 1 else "W @ c.T")
    schedule = schedule_of(bank, conditions)

    def by_hand(written: nn.ModuleList, x: Tensor, condition: Tensor) -> Tensor:
        for block in written:
            x = block(x, condition)
        return x

    ways: dict[str, Callable[[], Tensor]] = {
        "written": lambda: by_hand(written, x, condition),
        "bank": lambda: stack(x, list(bank(condition).values())),
        "one GEMM": lambda: stack(x, stacked(condition)),
        "schedule": lambda: stack(x, list(schedule(step).values())),
        "table": lambda: stack(x, table(step)),
        "no conditioning": lambda: bare(x),
    }
    with torch.no_grad():
        wanted = by_hand(copy.deepcopy(written).double(), x.double(), condition.double())
    for name, way in ways.items():
        with torch.set_grad_enabled(name != "schedule"):
            assert name == "no conditioning" or distance(way(), wanted) < TOLERANCE, name
    gradient = torch.randn_like(x)

    def inference(way: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            way()

    def training(way: Callable[[], Tensor], parameters: list[nn.Parameter]) -> None:
        torch.autograd.grad(way(), parameters, gradient)

    trained = {"written": written, "bank": stack, "no conditioning": bare}
    modes: dict[str, dict[str, Callable[[], object]]] = {
        "inference": {name: partial(inference, way) for name, way in ways.items()},
        "training": {
            name: partial(training, ways[name], list(model.parameters()))
            for name, model in trained.items()
        },
    }
    found = []
    for mode, passes in modes.items():
        with schedule:
            seconds, others = quietly(passes, budget=budget, rounds=rounds)
        tabled = mode == "inference" and size == (1, 16)
        row = {
            "blocks": blocks,
            "width": width,
            "batch": batch,
            "tokens": tokens,
            "mode": mode,
            **told(seconds, others, "written", [("schedule than bank", 1.15)] * tabled),
        }
        found.append(row)
    return found


def told(
    seconds: Mapping[str, list[float]],
    others: float | None,
    than: str,
    goals: Sequence[tuple[str, float]],
) -> dict[str, Any]:
    """Milliseconds, how many times faster each way is than one of them, and the goals."""
    pairs = [(way, than) for way in seconds if way != than]
    return {
        "rounds": len(seconds[than]),
        "others": others,
        "ms": {way: 1e3 * median(took) for way, took in seconds.items()},
        "faster": compared(seconds, [*pairs, ("schedule", "bank"), ("table", "bank")]),
        "goals": [{"of": of, "by": by} for of, by in goals],
    }


def line(row: Mapping[str, Any]) -> str:
    """A row as it is printed."""
    place = ", ".join(f"{row[key]} {key}" for key in _PLACE if key in row)
    took = ", ".join(f"{way} {ms:.3f}" for way, ms in row["ms"].items())
    told = ", ".join(f"{pair} {value['ratio']:.2f}" for pair, value in row["faster"].items())
    reached = [
        f"{'met' if ok else 'MISSED'}: {goal['of']} {goal['by']}"
        for goal, ok in zip(row["goals"], met(row), strict=True)
    ]
    return (
        f"{place}: ms {took}; {told}; {row['rounds']} rounds, others {row['others'] or 0:.0%}; "
        f"{'; '.join(reached)}"
    )


_PLACE = ("sites", "blocks", "width", "batch", "tokens", "mode")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="the file to write")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for a row's rounds")
    parser.add_argument("--rounds", type=int, default=50, help="the most rounds of a row")
    parser.add_argument("--tiny", action="store_true", help="everything at a size for trying out")
    arguments = parser.parse_args()
    rounds = (min(11, arguments.rounds), arguments.rounds)
    stages, stack = (((2, 16),), (2, 16, 2)) if arguments.tiny else (STAGES, STACK)
    generated, passed = [], []
    for sites, width in stages:
        for row in stage(sites, width, arguments.budget, rounds):
            print(line(row), flush=True)
            generated.append(row)
    for size in SIZES[:1] if arguments.tiny else SIZES:
        for row in steps(*stack, size, arguments.budget, rounds):
            print(line(row), flush=True)
            passed.append(row)
    if arguments.json:
        whole = {**machine(), "stages": generated, "steps": passed}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
