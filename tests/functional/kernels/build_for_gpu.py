"""Compiles the kernels for an H100 that need not be there; prints one JSON line for each.

Run by test_kernels.py in a process of its own, without the interpreter.
"""

import json
import re
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from condmod.functional import kernels
from condmod.functional.kernels import layout, sums, tiles


class Absent:
    """What Triton asks of the driver of a device before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiled:
    """Stands in a kernel's place, and compiles where that would run."""

    def __init__(self, name: str, kernel: Any) -> None:
        self.name, self.kernel = name, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_only(*args: object, **constants: object) -> None:
            built = self.kernel.warmup(*args, grid=grid, **constants)
            text = built.asm["ptx"]
            widths = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", text)
            row = {
                "kernel": self.name,
                "read_bits": max(int(many or 1) * int(bits) for many, bits in widths),
                "atomics": len(re.findall(r"\b(?:atom|red)\.", text)),
                "binary": len(built.asm["cubin"]) > 0,
            }
            sys.stdout.write(json.dumps(row) + "\n")

        return compile_only


driver.set_active(Absent())
for module in (tiles, sums):
    for name in ("forward_tile", "backward_tile", "sum_positions", "channel_statistics",
                 "line_statistics", "line_moments"):  # fmt: skip
        if name in vars(module):
            setattr(module, name, Compiled(name, getattr(module, name)))


def differentiate(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def features(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, requires_grad=True)


both = {"plus": 1.0, "norm": "layer"}
x, y = features(2, 64, 384), features(2, 64, 384)
leaf, rows = features(2, 384), features(2, 4, 384)
index = torch.zeros(2, 64, dtype=torch.int64)
differentiate(*kernels.gate_residual_norm_affine(x, y, leaf, leaf, leaf, **both))
differentiate(*kernels.gate_residual_norm_affine(x, y, rows, rows, rows, index=index, **both))
differentiate(kernels.norm_affine(x, *features(2, 64, 768).chunk(2, -1), **both))
differentiate(kernels.gate_residual(x, y, leaf))
for dtype in (torch.float32, torch.float64):
    wide = features(2, 64, 384, dtype=dtype)
    differentiate(kernels.norm_affine(wide, leaf, leaf, plus=1.0, norm="rms"))
image = features(2, 64, 16, 16)
bands = features(2, 64)
first = {"channel_dim": 1, "plus": 1.0}
differentiate(kernels.norm_affine(image, bands, bands, norm="group", groups=8, **first))
differentiate(kernels.norm_affine(image, bands, bands, norm="layer", **first))
differentiate(kernels.norm_affine(image, bands, bands, **first))
long = features(1, 8, 16384)
differentiate(kernels.norm_affine(long, features(1, 16384), None, **both))
# With offsets of 64 bits, as far tensors need them.
layout.is_far = lambda *parts: True
differentiate(*kernels.gate_residual_norm_affine(x, y, rows, rows, rows, index=index, **both))
