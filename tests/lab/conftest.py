"""What the lab's tests share: a run that takes a moment, and a console that can be read."""

import signal
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from condmod_lab.config import TrainConfig, make_config

TINY = {
    "backbone": {"channels": 8, "blocks": 1, "condition_dim": 8},
    "training": {"steps": 6, "batch": 16, "log_every": 2, "checkpoint_every": 3},
    "sampling": {"samples": 40, "steps": 2},
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much where several tests run at once."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the commands that tests start
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _signals_arrive() -> Iterator[None]:
    """Also where the tests were started by nohup or in the background, which ignore some."""
    numbers = [getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP")]
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, own)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Make the config of a tiny run in the folder `run`, with overrides as on the command line."""

    def make(*overrides: str, **fields: Any) -> TrainConfig:
        return make_config({"output": str(tmp_path / "run"), **TINY, **fields}, overrides)

    return make


@pytest.fixture
def console() -> Console:
    """A console that is no terminal; `console.file.getvalue()` is what it printed."""
    return Console(file=StringIO(), width=200)
