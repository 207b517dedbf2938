"""How fast the hot passes are on this CPU; prints rows, and writes JSON with --json FILE.

Each mechanism as blog posts write it, as well as eager torch allows, by warm torch.compile, by
condmod, and by condmod under torch.compile: interleaved in one process, and first compared with
float64. `global` rows are whole modules, generator included; in `aligned`, `rows` and `given` rows,
and for the gate, the modulation is there already.

python benchmarks/passes.py
"""

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import torch
from forms import forms
from measuring import (
    compared,
    distance,
    faster,
    machine,
    met,
    no_compiler,
    quietly,
    saved_bytes,
    slower,
)
from torch import Tensor, nn
from torch.nn import functional as F

CONDITION = 256
ROWS = 4  # of a table that the positions choose among
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
NAMES = ("film", "dense_film", "adaln", "gate", "ada_group_norm")
SHAPES = {"A": (8, 256, 384), "B": (8, 256, 1152), "C": (1, 4096, 3072)}
PICTURES = (8, 256, 32, 32)  # [B, C, H, W]
TINY = (2, 4, 64)
CALLS = 100
HANDS = {"written", "best", "addcmul"}
COMPARED = (
    ("best", "written"),
    ("addcmul", "written"),
    ("compile", "written"),
    ("max-autotune", "written"),
    ("condmod", "written"),
    ("condmod", "hand"),
    ("condmod", "compile"),
    ("condmod", "max-autotune"),
    ("compiled condmod", "written"),
    ("compiled condmod", "compile"),
)


class Cell(NamedTuple):
    """One mechanism at one shape, [B, T, C] or [B, C, ...]."""

    name: str
    shape: tuple[int, ...]
    condition: str  # global, aligned, rows or given
    dtype: torch.dtype = torch.float32

    @property
    def channel_dim(self) -> int:
        """Where C is."""
        return 1 if self.name == "ada_group_norm" or len(self.shape) == 4 else -1

    @property
    def positions(self) -> tuple[int, ...]:
        """Where the features are."""
        return self.shape[1:-1] if self.channel_dim == -1 else self.shape[2:]

    def inputs(self) -> tuple[Tensor, ...]:
        """What every form is called with."""
        batch, features = self.shape[0], self.shape[self.channel_dim]
        places = {"aligned": self.positions, "rows": (ROWS,)}.get(self.condition, ())
        drawn: list[tuple[int, ...]] = [self.shape]
        if self.name == "gate":
            drawn += [self.shape, (batch, *places, features)]
        elif self.condition == "global":
            drawn += [(batch, CONDITION)]
        else:
            drawn += [(batch, *places, 2 * features)]
        return tuple(torch.randn(size).to(self.dtype).requires_grad_() for size in drawn)

    def forms(self) -> dict[str, nn.Module]:
        """Every way to write it, with the same parameters."""
        width = CONDITION if self.condition == "global" else None
        index = None
        if self.condition == "rows":
            index = torch.randint(ROWS, (self.shape[0], *self.positions))
        found = forms(self.name, self.shape[self.channel_dim], width, self.channel_dim, index)
        if self.dtype == torch.float32:
            found.pop("addcmul", None)
        return found

    def units(self, *, training: bool) -> int:
        """How often a tensor of the features' size must be read or written, at the least."""
        aligned, gate = self.condition == "aligned", self.name == "gate"
        forward = 2 + (gate if gate else 2 * aligned) + (gate and aligned)
        return forward + 3 + 2 * aligned if training else forward


def cells(shapes: Mapping[str, tuple[int, ...]]) -> list[Cell]:
    """Every mechanism with a global condition everywhere, and with an aligned one at A and B."""
    found = []
    for name, (letter, (batch, positions, features)) in product(NAMES, shapes.items()):
        first = name == "ada_group_norm"
        shape = (batch, features, positions) if first else (batch, positions, features)
        found.append(Cell(name, shape, "global"))
        if batch > 1:
            found.append(Cell(name, shape, "aligned"))
        if letter == "A" and name in {"film", "adaln"}:
            found.append(Cell(name, shape, "rows"))
            found.append(Cell(name, shape, "given", torch.bfloat16))
    return found


def goals(cell: Cell, *, training: bool) -> list[tuple[str, float]]:
    """What condmod has to be faster than, and by how much."""
    if training:
        return []
    single = cell.dtype == torch.float32
    found = []
    if cell.name == "film":
        found.append(("written", 1.4 if single and cell.condition == "global" else 0.95))
    if cell.name == "dense_film":
        found.append(("written", 1.3))
    if cell.name == "adaln":
        found.append(("written", 2.2))
        if cell.shape[0] > 1:
            found.append(("compile", 1.2))
    return found


def checked(cell: Cell, form: nn.Module, wanted: tuple[Tensor, ...], inputs: Any) -> float:
    """The largest distance of an output or gradient from float64.

    Raises:
        AssertionError: it is more than rounding.
    """
    with torch.no_grad():
        plain = form(*inputs)
    y = form(*inputs)
    got = plain, y, *slopes(form, inputs, y)
    far = max(distance(one, other) for one, other in zip(got, wanted, strict=True))
    assert far < TOLERANCE[cell.dtype], (cell, form, far)
    return far


def slopes(form: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> list[Tensor]:
    """The gradients of inputs, of all matrices and of all vectors, however a form cuts these."""
    parameters = [p for p in form.parameters() if p.requires_grad]
    ones = torch.ones_like(y)
    found = torch.autograd.grad(y, (*inputs, *parameters), ones, allow_unused=True)
    own = sorted((g for g in found[len(inputs) :] if g is not None), key=Tensor.numel)
    parts = [torch.cat([g for g in own if g.ndim == rank] or [y[:0].flatten()]) for rank in (1, 2)]
    return [*found[: len(inputs)], *(part for part in parts if part.numel())]


def measured(cell: Cell, budget: float, rounds: tuple[int, int], *, compiled: bool) -> list[Any]:
    """Two rows, inference and training."""
    torch.manual_seed(0)
    torch.compiler.reset()  # or dynamo gives up on what it has compiled for many shapes
    inputs, variants = cell.inputs(), cell.forms()
    ways = [("compile", "written", "default"), ("compiled condmod", "condmod", "default")]
    if cell.shape[0] > 1 and cell.shape[cell.channel_dim] < 512 and cell.condition == "global":
        ways.append(("max-autotune", "written", "max-autotune"))  # it takes seconds to compile
    for name, form, mode in ways if compiled else ():
        way = torch.compile(variants[form], dynamic=False, mode=mode)
        variants[name] = cast(nn.Module, way)
    wide = tuple(value.detach().double().requires_grad_() for value in inputs)
    exact = copy.deepcopy(variants["written"]).double()
    y = exact(*wide)
    wanted = (y, y, *slopes(exact, wide, y))
    errors = {name: checked(cell, form, wanted, inputs) for name, form in variants.items()}
    held = {
        name: saved_bytes(partial(form, *inputs), [*inputs, *form.parameters(), *form.buffers()])
        for name, form in variants.items()
    }
    del y, wide, wanted, exact
    gradient, target = torch.randn_like(inputs[0]), torch.empty_like(inputs[0])

    def forward(form: nn.Module) -> None:
        with torch.no_grad():
            form(*inputs)

    def backward(form: nn.Module) -> None:
        parameters = [p for p in form.parameters() if p.requires_grad]
        torch.autograd.grad(form(*inputs), [*inputs, *parameters], gradient, allow_unused=True)

    def copied() -> None:
        with torch.no_grad():
            target.copy_(inputs[0])

    found = []
    for training, run in ((False, forward), (True, backward)):
        passes: dict[str, Callable[[], object]] = {
            name: partial(run, form) for name, form in variants.items()
        }
        seconds, others = quietly({**passes, "copy": copied}, budget=budget, rounds=rounds)
        moved = cell.units(training=training) * gradient.nbytes
        copying = 2 * gradient.nbytes / median(seconds["copy"])
        row = {
            "pass": cell.name,
            "shape": list(cell.shape),
            "dtype": str(cell.dtype).removeprefix("torch."),
            "condition": cell.condition,
            "mode": "training" if training else "inference",
            "rounds": len(seconds["copy"]),
            "others": others,
            "copy_gbps": copying / 1e9,
            "variants": {
                name: {
                    "ms": 1e3 * median(seconds[name]),
                    "gbps": moved / median(seconds[name]) / 1e9,
                    "of_copy": moved / median(seconds[name]) / copying,
                    "error": errors[name],
                    "saved_mib": held[name] / 2**20 if training else None,
                }
                for name in variants
            },
            **ratios(seconds),
            "goals": [
                {"of": f"condmod than {than}", "by": by}
                for than, by in goals(cell, training=training)
                if than in variants
            ],
        }
        found.append(row)
    return found


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """How many times faster one variant is than another; `hand` is the fastest by hand."""
    hand = min(HANDS & seconds.keys(), key=lambda name: median(seconds[name]))
    return {"hand": hand, "faster": compared({**seconds, "hand": seconds[hand]}, COMPARED)}


def called(name: str, rounds: int, *, compiled: bool) -> dict[str, Any]:
    """What a call costs at a tiny size, where Python is all that it costs."""
    torch.manual_seed(0)
    torch.compiler.reset()
    x, condition = torch.randn(TINY), torch.randn(TINY[0], CONDITION)
    variants = forms(name, TINY[-1], CONDITION, -1)
    ours: Any = variants["condmod"]
    weight, bias = ours.proj.weight, ours.proj.bias
    with torch.no_grad():
        ones, zeros = torch.ones(TINY[-1]), torch.zeros(TINY[-1])

    def film(x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = F.linear(condition, weight, bias).unsqueeze(1).chunk(2, dim=-1)
        return torch.addcmul(beta, x, gamma)

    def adaln(x: Tensor, condition: Tensor) -> Tensor:
        rows = F.linear(F.silu(condition), weight, bias).unsqueeze(1)
        shift, scale = rows.chunk(2, dim=-1)
        h = F.layer_norm(x, (TINY[-1],), ones, zeros, 1e-6)
        return torch.addcmul(shift, h, 1 + scale, out=h)

    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "bare": {"film": film, "adaln": adaln}[name],
        "written": variants["written"],
        "condmod": ours,
    }
    if compiled:
        ways["compile"] = torch.compile(variants["written"], dynamic=False)

    def repeated(way: Callable[[Tensor, Tensor], Tensor]) -> None:
        for _ in range(CALLS):
            way(x, condition)

    with torch.no_grad():
        wanted = copy.deepcopy(variants["written"]).double()(x.double(), condition.double())
        for way in ways.values():
            assert distance(way(x, condition), wanted) < TOLERANCE[x.dtype]
        passes = {way: partial(repeated, run) for way, run in ways.items()}
        seconds, others = quietly(passes, budget=2.0, rounds=(rounds, rounds))
    return {
        "pass": name,
        "shape": list(TINY),
        "rounds": rounds,
        "others": others,
        "us": {way: 1e6 * median(took) / CALLS for way, took in seconds.items()},
        "slower": {way: faster(seconds, "bare", way) for way in ways if way != "bare"},
        "goal": 1.25,
    }


def line(row: Mapping[str, Any]) -> str:
    """A row as it is printed."""
    told = ", ".join(f"{pair} {value['ratio']:.2f}" for pair, value in row["faster"].items())
    reached = [
        f"{'met' if ok else 'MISSED'}: {goal['of']} {goal['by']}"
        for goal, ok in zip(row["goals"], met(row), strict=True)
    ]
    if slower(row["faster"]["condmod than hand"], row["rounds"]):
        reached.append("SLOWER than by hand")
    ours = row["variants"]["condmod"]
    return (
        f"{row['pass']:<14} {row['shape']!s:<18} {row['condition']:<7} {row['mode']:<9} "
        f"{ours['ms']:8.3f} ms {ours['of_copy']:4.0%} of copy, {row['rounds']} rounds, "
        f"others {row['others'] or 0:.0%}; {told}; {'; '.join(reached)}"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="the file to write")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for a row's rounds")
    parser.add_argument("--rounds", type=int, default=50, help="the most rounds of a row")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help="which of A, B and C")
    parser.add_argument("--tiny", action="store_true", help="everything at a size for trying out")
    arguments = parser.parse_args()
    without = "--eager" if arguments.eager else no_compiler()
    rounds = (min(11, arguments.rounds), arguments.rounds)
    shapes, pictures = {letter: SHAPES[letter] for letter in arguments.shapes}, PICTURES
    if arguments.tiny:
        shapes = {letter: (shape[0], 4, 64) for letter, shape in shapes.items()}
        pictures = (2, 64, 4, 4)
    chosen = cells(shapes)
    if "A" in shapes:
        chosen.append(Cell("film", pictures, "given", torch.bfloat16))
    found, calls = [], []
    for cell in chosen:
        for row in measured(cell, arguments.budget, rounds, compiled=not without):
            print(line(row), flush=True)
            found.append(row)
    for name in ("film", "adaln") if "A" in shapes else ():
        calls.append(called(name, arguments.rounds, compiled=not without))
        took = ", ".join(f"{way} {us:.1f} µs" for way, us in calls[-1]["us"].items())
        print(f"a call of {name}: {took}", flush=True)
    if arguments.json:
        whole = {**machine(), "no_compile": without, "rows": found, "calls": calls}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
