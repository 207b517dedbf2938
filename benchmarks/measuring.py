"""What the benchmarks share: interleaved rounds, ratios with their spread, and where it was run."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

WARMUP = 3
QUIET = 0.05  # the share of other processes above which a measurement is taken again
ATTEMPTS = 3
_STAT = Path("/proc/stat")


def interleaved(
    passes: Mapping[str, Callable[[], object]], rounds: int, *, repeat: int = 1
) -> dict[str, list[float]]:
    """Seconds of each pass in every round, the best of `repeat`; the order turns each round."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(rounds + WARMUP):
        order = list(passes) if turn % 2 else list(passes)[::-1]
        for name in order:
            took = [_seconds(passes[name]) for _ in range(repeat)]
            if turn >= WARMUP:
                seconds[name].append(min(took))
    return seconds


def quietly(
    passes: Mapping[str, Callable[[], object]], *, budget: float, rounds: tuple[int, int]
) -> tuple[dict[str, list[float]], float | None]:
    """`interleaved` in as many rounds as a budget allows, again while others keep the CPU busy.

    Args:
        passes: what is timed, called once before.
        budget: seconds.
        rounds: the fewest and the most.

    Returns:
        The seconds of each pass, and the share of other processes.
    """
    each = {name: min(_seconds(run) for _ in range(2)) for name, run in passes.items()}
    fewest, most = rounds
    repeat = max(1, min(8, int(budget / most / sum(each.values()))))
    fitting = max(fewest, min(most, int(budget / repeat / sum(each.values()))))
    found: list[tuple[float, dict[str, list[float]]]] = []
    for _ in range(ATTEMPTS):
        with Others() as others:
            seconds = interleaved(passes, fitting, repeat=repeat)
        if others.share is None:
            return seconds, None
        found.append((others.share, seconds))
        if others.share <= QUIET:
            break
    share, seconds = min(found, key=lambda pair: pair[0])
    return seconds, share


def faster(seconds: Mapping[str, Sequence[float]], one: str, other: str) -> dict[str, float]:
    """How many times faster `one` is than `other`: the median of the rounds, and its interval."""
    ratios = [b / a for a, b in zip(seconds[one], seconds[other], strict=True)]
    low, high = interval(ratios)
    return {"ratio": statistics.median(ratios), "low": low, "high": high}


def compared(
    seconds: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[str, float]]:
    """`faster` of every pair that was measured, by "one than other"."""
    return {
        f"{one} than {other}": faster(seconds, one, other)
        for one, other in pairs
        if one in seconds and other in seconds
    }


def slower(ratio: Mapping[str, float], rounds: int) -> bool:
    """Whether a ratio below 1 is more than noise: under 1.2 a gap needs 50 rounds to count."""
    return ratio["high"] < 1 and (rounds >= 50 or ratio["ratio"] < 1 / 1.2)


def met(row: Mapping[str, Any]) -> list[bool]:
    """For each goal of a row, "one than other" by so much, whether it is met."""
    return [row["faster"][goal["of"]]["ratio"] >= goal["by"] for goal in row["goals"]]


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """A 95% bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return float(low), float(high)


def distance(got: Tensor, wanted: Tensor) -> float:
    """The norm of the difference, as a share of what is wanted."""
    return float(((got.double() - wanted).norm() / wanted.norm()).detach())


def saved_bytes(run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> int:
    """What a forward pass keeps for its backward, beyond inputs and parameters."""
    held: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return saved

    with saved_tensors_hooks(keep, lambda saved: saved):
        result = run()  # while it lives, no address is used twice
    for known in inputs:
        held.pop(known.untyped_storage().data_ptr(), None)
    del result
    return sum(held.values())


def no_compiler() -> str:
    """Why torch.compile cannot be measured here; "" where it can."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(4))
    except Exception as error:  # noqa: BLE001  whatever a machine lacks
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.120}"
    finally:
        torch.compiler.reset()
    return ""


def machine() -> dict[str, Any]:
    """Where and when it was run."""
    allocator = {
        name: os.environ[name]
        for name in ("LD_PRELOAD", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
        if name in os.environ
    }
    return {
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "allocator": allocator or "default",
        "date": date.today().isoformat(),
    }


class Others:
    """The share of all CPU time that other processes took; None where /proc/stat is missing."""

    share: float | None = None

    def __enter__(self) -> "Others":
        self._start = _jiffies()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end = _jiffies()
        if self._start is None or end is None:
            return
        total, idle, own = (b - a for a, b in zip(self._start, end, strict=True))
        if total:
            self.share = max(0.0, (total - idle - own) / total)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _jiffies() -> tuple[float, float, float] | None:
    """All CPU time, what of it was idle, and what this process took."""
    if not _STAT.exists():
        return None
    # user nice system idle iowait irq softirq steal; guests are in user already
    fields = [int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
    own = sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")
    return sum(fields), fields[3] + fields[4], own


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()
