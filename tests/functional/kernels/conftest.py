"""The kernels' tests run on a GPU, or by Triton's interpreter.

The interpreter is chosen by TRITON_INTERPRET=1 before triton is first imported, and importing
torch._dynamo imports it, so such tests have a process of their own: test_kernels.py, one folder up,
starts one for each file here. By hand: TRITON_INTERPRET=1 pytest tests/functional/kernels.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

RUNS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
if not RUNS:
    collect_ignore_glob = ["test_*.py"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """A call of a kernel: `op` is affine, scale, shift, plain, gate or both."""

    op: str
    shape: tuple[int, ...]
    leaf: str = "global"
    norm: str | None = None
    channel_dim: int = -1
    groups: int = 1
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous
    index_dtype: torch.dtype = torch.int64
    rows: int = 4


@dataclass
class Problem:
    """A case with its tensors: random, requiring gradients, the same for the same case."""

    case: Case
    dtype: torch.dtype
    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    index: Tensor | None = None

    @property
    def inputs(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors.values() if tensor is not None]

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the kernels give, of the problem's tensors or of others in their place."""
        from condmod.functional import kernels

        case = self.case
        x, y, gate, scale, shift = self._all(tensors)
        common = {"channel_dim": case.channel_dim, "index": self.index}
        if case.op == "gate":
            return (kernels.gate_residual(x, y, gate, plus=0.5, **common),)
        norming = {"plus": 1.0, "norm": case.norm, "eps": 1e-5, **common}
        if case.op == "both":
            return kernels.gate_residual_norm_affine(
                x, y, gate, scale, shift, gate_plus=0.5, **norming
            )
        return (kernels.norm_affine(x, scale, shift, groups=case.groups, **norming),)

    def reference(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The formula, with a whole tensor for each step, channels last."""
        case = self.case
        x, y, gate, scale, shift = self._all(tensors)
        h = x.movedim(case.channel_dim, -1)
        found = []
        if y is not None:
            h = h + (0.5 + self._spread(gate)) * y.movedim(case.channel_dim, -1)
            found.append(h)
        if case.op != "gate":
            h = _normed(h, case.norm, case.groups)
            if scale is not None:
                h = (1 + self._spread(scale)) * h
            if shift is not None:
                h = h + self._spread(shift)
            found.append(h)
        return tuple(h.movedim(-1, case.channel_dim) for h in found)

    def _all(self, tensors: tuple[Tensor, ...]) -> list[Any]:
        others = iter(tensors or self.inputs)
        return [None if tensor is None else next(others) for tensor in self.tensors.values()]

    def _spread(self, leaf: Tensor) -> Tensor:
        """A leaf that broadcasts against features with the channels last."""
        if leaf.ndim == 2:
            middle = [1] * (len(self.case.shape) - 2)
            return leaf.reshape(leaf.shape[0], *middle, leaf.shape[1])
        if self.index is None:
            return leaf.movedim(self.case.channel_dim, -1)
        samples = torch.arange(leaf.shape[0], device=leaf.device)
        samples = samples.view(-1, *[1] * (self.index.ndim - 1)).expand(self.index.shape)
        return leaf[samples, self.index.long()]


def _normed(h: Tensor, norm: str | None, groups: int) -> Tensor:
    if norm is None:
        return h
    if norm == "rms":
        return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if norm == "layer":
        grouped, over = h, (-1,)
    else:
        grouped = h.reshape(h.shape[0], math.prod(h.shape[1:-1]), groups, h.shape[-1] // groups)
        over = (1, 3)
    away = grouped - grouped.mean(over, keepdim=True)
    return (away / (away.square().mean(over, keepdim=True) + 1e-5).sqrt()).reshape(h.shape)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def make() -> Callable[[Case, torch.dtype], Problem]:
    """Builds the problem of a case."""

    def problem(case: Case, dtype: torch.dtype) -> Problem:
        rng = torch.Generator().manual_seed(0)
        channel_dim = case.channel_dim % len(case.shape)
        batch, channels = case.shape[0], case.shape[channel_dim]
        shapes = {
            "global": (batch, channels),
            "rows": (batch, case.rows, channels),
            "aligned": case.shape,
            "chunk": case.shape,
        }
        wanted = {"affine": "scale shift", "both": "y gate scale shift", "gate": "y gate"}
        names = ["x", *wanted.get(case.op, case.op).split()]

        def leaf() -> Tensor:
            shape = shapes[case.leaf]
            whole = torch.randn(*shape[:-1], 2 * shape[-1], generator=rng).to(DEVICE, dtype)
            # A view into what a projection gave, with other strides than the features.
            return whole.chunk(2, -1)[1] if case.leaf == "chunk" else whole.chunk(2, -1)[1].clone()

        def tensor(name: str) -> Tensor | None:
            if name not in names:
                return None
            if name in {"x", "y"}:
                # Away from zero, so that a mean matters.
                made = case.layout((torch.randn(case.shape, generator=rng) + 1).to(DEVICE, dtype))
            else:
                made = leaf()
            return made.detach().requires_grad_()

        tensors = {name: tensor(name) for name in ("x", "y", "gate", "scale", "shift")}
        positions = [n for place, n in enumerate(case.shape) if place not in {0, channel_dim}]
        index = torch.randint(0, case.rows, (batch, *positions), generator=rng)
        indexed = index.to(DEVICE, case.index_dtype) if case.leaf == "rows" else None
        return Problem(case, dtype, tensors, indexed)

    return problem


@pytest.fixture
def case() -> type[Case]:
    return Case


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
