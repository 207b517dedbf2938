"""A run that is asked to stop ends between two steps, keeps what it has learned, and then goes."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Stopping:
    """Notes Ctrl-C, SIGTERM and SIGHUP while it is entered; the second one acts at once.

    Attributes:
        asked: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def go(self) -> None:
        """Let the signal do now what it would have done; where another process got it, SIGTERM."""
        signal.raise_signal(self.asked or signal.SIGTERM)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.asked is not None:
            self.__exit__()
            signal.raise_signal(number)
        self.asked = number


class Terminating:
    """Lets SIGTERM and SIGHUP unwind what is under way as Ctrl-C does, and then do their own."""

    def __enter__(self) -> Self:
        self._asked: int | None = None
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS[1:]:
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._before[number] = signal.signal(number, self._unwind)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._asked is not None:
            signal.raise_signal(self._asked)

    def _unwind(self, number: int, _: FrameType | None) -> None:
        self._asked = number
        raise KeyboardInterrupt
