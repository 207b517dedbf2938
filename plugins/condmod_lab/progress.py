"""How a run shows where it stands: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

_LINES = 10
_SECONDS_BETWEEN_LINES = 15.0
_WIDTH_FOR_A_BAR = 60


class Tracker(AbstractContextManager["Tracker"], Protocol):
    """Is told of every step; a context manager around the loop."""

    def __enter__(self) -> Self: ...

    def start(self, done: int) -> None:
        """`done` steps were behind us when the loop began."""

    def step(self, done: int, loss: float) -> None:
        """`done` steps are behind us; `loss` is the last one's."""


def tell(console: Console, line: str) -> None:
    """Print a line as it is: neither wrapped nor coloured, brackets and all."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def track(total: int, console: Console) -> Tracker:
    """A bar where the console is a terminal, else about ten plain lines."""
    return Bar(total, console) if console.is_terminal else Lines(total, console)


class Pace:
    """Smoothed loss, rate and time left, worked out from the steps so far."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.first = 0
        self.started = time.monotonic()
        self.loss = math.nan

    def describe(self, done: int, loss: float) -> str:
        """`loss 0.412  21.4 steps/s  0:41 left`."""
        self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
        rate = (done - self.first) / max(time.monotonic() - self.started, 1e-9)
        minutes, seconds = divmod(math.ceil((self.total - done) / rate), 60)
        return f"loss {self.loss:.3g}  {rate:.1f} steps/s  {minutes}:{seconds:02d} left"


class Bar:
    """A rich progress bar."""

    def __init__(self, total: int, console: Console) -> None:
        self._pace = Pace(total)
        self._progress = Progress(
            *([BarColumn(bar_width=None)] if console.width >= _WIDTH_FOR_A_BAR else []),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
        )
        self._task = self._progress.add_task("training", total=total, state="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, done: int) -> None:
        """Begin where a former run has come to."""
        self._pace.first = done
        self._progress.update(self._task, completed=done)

    def step(self, done: int, loss: float) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, state=self._pace.describe(done, loss))


class Lines:
    """A plain line at every tenth of the way, and at least every quarter of a minute."""

    def __init__(self, total: int, console: Console) -> None:
        self._pace = Pace(total)
        self._total = total
        self._console = console
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def start(self, done: int) -> None:
        """Begin where a former run has come to."""
        self._pace.first = done

    def step(self, done: int, loss: float) -> None:
        """Print a line if one is due."""
        text = self._pace.describe(done, loss)
        tenth = done * _LINES // self._total > (done - 1) * _LINES // self._total
        if tenth or time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._console.print(
                f"step {done}/{self._total}  {text}", soft_wrap=True, highlight=False
            )
