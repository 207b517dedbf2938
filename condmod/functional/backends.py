"""The one door of the passes: which backend does them.

auto: torch's ops, chosen by rule for dtype, layout and device; one formula where a compiler reads.
eager: the same. compile: each pass by itself under torch.compile. triton: fused kernels, forward
and backward, for what they serve, and torch's ops for the rest.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, Literal, cast, get_args

import torch
from torch import Tensor

from condmod.errors import BackendError
from condmod.functional import eager, fused
from condmod.functional.eager import Affine

Backend = Literal["auto", "eager", "compile", "triton"]
_NAMES: Final = get_args(Backend)
VARIABLE: Final = "CONDMOD_BACKEND"


class _Chosen(threading.local):
    """The choice of a `with` block, in its thread alone."""

    name: Backend | None = None


_chosen = _Chosen()
_everywhere = [os.environ.get(VARIABLE) or "auto"]


def set_backend(name: Backend) -> None:
    """Choose what does the passes of every modulator, in every thread, from now on.

    Args:
        name: auto, eager, compile or triton. Before it is called the environment's
            CONDMOD_BACKEND holds, and without that auto.

    Raises:
        BackendError: there is no such backend. Where triton cannot run, the first pass says why.
    """
    _everywhere[:] = [_checked(name, "set_backend")]


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Choose what does the passes inside a `with` block, in this thread.

    A backward pass goes by the backend of its forward, wherever it is called.

    Raises:
        BackendError: there is no such backend. Where triton cannot run, the first pass says why.
    """
    before, _chosen.name = _chosen.name, _checked(name, "use_backend")
    try:
        yield
    finally:
        _chosen.name = before


def backend() -> Backend:
    """What does the passes here and now."""
    return _chosen.name or _checked(_everywhere[0], VARIABLE)


def run_affine(x: Tensor, by: Affine) -> Tensor:
    """m(scale)·norm(x) + shift by the backend that is chosen."""
    name = _here(x)
    y = fused.affine(x, by) if name == "triton" else None
    if y is not None:
        return y
    if torch.compiler.is_compiling():
        return eager.plain_affine(x, by)
    if name == "compile":
        by.views(x)  # so that what does not fit is told before a compiler reads it
        return cast(Tensor, compiled(eager.plain_affine)(x, by._replace(where=str)))
    return eager.affine(x, by)


def run_gate(x: Tensor, y: Tensor, by: Affine) -> Tensor:
    """X + g(gate)·norm(y) by the backend that is chosen."""
    name = _here(x)
    joined = fused.gate(x, y, by) if name == "triton" else None
    if joined is not None:
        return joined
    if torch.compiler.is_compiling():
        return eager.plain_gate(x, y, by)
    if name == "compile":
        by.views(x)
        return cast(Tensor, compiled(eager.plain_gate)(x, y, by._replace(where=str)))
    return eager.gate(x, y, by)


def run_gate_affine(x: Tensor, y: Tensor, by: Affine, then: Affine) -> tuple[Tensor, Tensor]:
    """X + g(gate)·norm(y), and an affine of that, by the backend that is chosen."""
    name = _here(x)
    both = fused.gate_affine(x, y, by, then) if name == "triton" else None
    if both is not None:
        return both
    if name == "compile" and not torch.compiler.is_compiling():
        by.views(x)
        then.views(x)
        told = by._replace(where=str), then._replace(where=str)
        return cast(tuple[Tensor, Tensor], compiled(eager.plain_gate_affine)(x, y, *told))
    joined = run_gate(x, y, by)
    return joined, run_affine(joined, then)


def _here(x: Tensor) -> Backend:
    """The backend, checked against the device of the features."""
    name = backend()
    if name == "triton" and not torch.compiler.is_compiling():
        fused.check_here(x.device)
    return name


@cache
def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """A pass under torch.compile, once for all sites."""
    return torch.compile(run)


def _checked(name: str, said_by: str) -> Backend:
    if name not in _NAMES:
        raise BackendError(f"{said_by} takes one of {', '.join(_NAMES)}; got {name!r}")
    return name  # type: ignore[return-value]
