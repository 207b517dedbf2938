"""How fast the fused kernels are on a GPU; prints rows, and writes JSON with --json FILE.

Each pass from the modulation that is there already: as blog posts write it, by warm torch.compile
in both modes, by condmod's eager ops, by its kernels, and for RMS norm by Liger's where that is
installed. Interleaved in one process, first compared with float64, timed by Triton's do_bench,
which empties the cache before each run. Without a GPU, --tiny tries it out by Triton's interpreter:

TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from measuring import compared, distance, machine
from torch import Tensor
from torch.nn import functional as F

from condmod.functional import (
    featurewise_affine,
    gated_residual,
    gated_residual_affine,
    normalisation,
    use_backend,
)

SHAPES = ((1, 4096, 3072), (256, 256, 1152))
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
EPS = 1e-6
UNITS = {"film": (2, 5), "adaln": (2, 5), "ada_rms": (2, 5), "gate": (3, 6), "joined": (4, 10)}
GOALS = {("adaln", "forward"): 0.8, ("adaln", "training"): 0.75}
Outputs = tuple[Tensor, ...]
Way = Callable[..., Outputs]


class Cell(NamedTuple):
    """One pass at one shape [B, T, C], with vectors (B, C)."""

    name: str
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """Features, a branch, gate, scale and shift."""
        torch.manual_seed(0)
        batch, _, features = self.shape
        sizes: list[tuple[int, ...]] = [self.shape, self.shape, *[(batch, features)] * 3]
        drawn = [torch.randn(size, device=device).to(self.dtype) for size in sizes]
        return tuple(value.requires_grad_() for value in drawn)

    def ways(self, *, compiled: bool) -> dict[str, Way]:
        """Every way to do it; each reads what it needs of the inputs."""
        features = self.shape[-1]
        kind = {"adaln": "layer", "joined": "layer", "ada_rms": "rms"}.get(self.name)
        norm = normalisation(kind, features, eps=EPS) if kind else None  # type: ignore[arg-type]

        def ours(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Outputs:
            if self.name == "gate":
                return (gated_residual(x, y, gate),)
            if self.name == "joined":
                return gated_residual_affine(x, y, gate, (scale, shift), norm=norm)
            return (featurewise_affine(x, (scale, shift), norm=norm),)

        def by_kernel(*inputs: Tensor) -> Outputs:
            with use_backend("triton"):
                return ours(*inputs)

        hand = partial(written, self.name)
        found: dict[str, Way] = {"written": hand, "condmod": ours, "condmod triton": by_kernel}
        if compiled:
            found["compile"] = torch.compile(hand, dynamic=False)
            found["max-autotune"] = torch.compile(hand, dynamic=False, mode="max-autotune")
        if self.name == "ada_rms" and find_spec("liger_kernel"):
            found["liger"] = liger
        return found


def written(name: str, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Outputs:
    """The pass by hand."""
    gate, scale, shift = (value[:, None] for value in (gate, scale, shift))
    shape = x.shape[-1:]
    if name == "film":
        return (x * (1 + scale) + shift,)
    if name == "ada_rms":
        return (F.rms_norm(x, shape, eps=EPS) * (1 + scale) + shift,)
    if name == "adaln":
        return (F.layer_norm(x, shape, eps=EPS) * (1 + scale) + shift,)
    joined = x + gate * y
    if name == "gate":
        return (joined,)
    return joined, F.layer_norm(joined, shape, eps=EPS) * (1 + scale) + shift


def liger(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Outputs:  # noqa: ARG001
    """Liger's modulated RMS norm, not in place."""
    from liger_kernel.ops import LigerModulatedRMSNormFunction

    apply = LigerModulatedRMSNormFunction.apply
    return (apply(x, None, scale, shift, EPS, 0.0, "llama", False),)


def checked(cell: Cell, way: Way, inputs: tuple[Tensor, ...], wanted: Outputs) -> float:
    """The largest distance of an output or gradient from float64.

    Raises:
        AssertionError: it is more than rounding.
    """
    far = max(distance(a, b) for a, b in zip(results(way, inputs), wanted, strict=True))
    assert far < TOLERANCE[cell.dtype], (cell, way, far)
    return far


def results(way: Way, inputs: tuple[Tensor, ...]) -> Outputs:
    """Outputs, and the gradients of what they depend on."""
    made = way(*inputs)
    ones = [torch.ones_like(value) for value in made]
    slopes = torch.autograd.grad(made, inputs, ones, allow_unused=True)
    return *made, *(slope for slope in slopes if slope is not None)


def measured(
    cell: Cell, device: torch.device, rounds: int, *, compiled: bool
) -> list[dict[str, Any]]:
    """Two rows, forward and forward with backward."""
    torch.compiler.reset()
    inputs, ways = cell.inputs(device), cell.ways(compiled=compiled)
    wide = tuple(value.detach().double().requires_grad_() for value in inputs)
    wanted = results(partial(written, cell.name), wide)
    errors = {name: checked(cell, way, inputs, wanted) for name, way in ways.items()}
    del wide, wanted
    target = torch.empty_like(inputs[0])

    def forward(way: Way) -> None:
        with torch.no_grad():
            way(*inputs)

    def copied(_: Way | None = None) -> None:
        target.copy_(inputs[0].detach())

    runs = {"forward": forward, "training": lambda way: results(way, inputs)}
    found = []
    for at, (mode, run) in enumerate(runs.items()):
        seconds: dict[str, list[float]] = {name: [] for name in (*ways, "copy")}
        for _ in range(rounds):
            for name in seconds:
                timed = copied if name == "copy" else partial(run, ways[name])
                seconds[name].append(_seconds(timed, device))
        copying = 2 * target.nbytes / median(seconds["copy"])
        moved = UNITS[cell.name][at] * target.nbytes
        pairs = [(way, other) for way in ways for other in ways if way != other]
        of_copy = {name: moved / median(seconds[name]) / copying for name in ways}
        goal = GOALS.get((cell.name, mode))
        found.append(
            {
                "pass": cell.name,
                "shape": list(cell.shape),
                "dtype": str(cell.dtype).removeprefix("torch."),
                "mode": mode,
                "rounds": rounds,
                "copy_gbps": copying / 1e9,
                "ms": {name: 1e3 * median(took) for name, took in seconds.items()},
                "gbps": {name: moved / median(seconds[name]) / 1e9 for name in ways},
                "of_copy": of_copy,
                "goal": None if goal is None else of_copy["condmod triton"] >= goal,
                "peak_mib": {name: _peak(partial(run, way), device) for name, way in ways.items()},
                "errors": errors,
                "faster": compared(seconds, pairs),
            }
        )
    return found


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=5, rep=25, return_mode="median")) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _peak(run: Callable[[], object], device: torch.device) -> float | None:
    """MiB that a run takes beyond what is there before it; nothing is known of a CPU's."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    took = ", ".join(
        f"{name} {ms:.3f} ms ({row['of_copy'][name]:.0%} of copy)"
        for name, ms in row["ms"].items()
        if name != "copy"
    )
    return f"{row['pass']:<8} {row['shape']!s:<18} {row['mode']:<8} {took}"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="the file to write")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--tiny", action="store_true", help="at a size for trying out")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = ((2, 3, 40),) if arguments.tiny else SHAPES
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = []
    for name in UNITS:
        for shape in shapes:
            cell = Cell(name, shape, dtype)
            compiled = not (arguments.eager or arguments.tiny)
            for row in measured(cell, device, arguments.rounds, compiled=compiled):
                print(line(row), flush=True)
                found.append(row)
    if arguments.json:
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
        where = {**machine(), "gpu": gpu, "triton": version("triton")}
        arguments.json.write_text(json.dumps({**where, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
