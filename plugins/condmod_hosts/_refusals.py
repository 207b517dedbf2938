"""Why what a module reads cannot be conditioned, where several hosts say it alike."""

from collections.abc import Callable
from typing import Any


def output_alone(reads: str) -> Callable[[Any, str], str]:
    """Refuse every placement but the output of what reads no features of one width.

    Args:
        reads: what it reads instead.
    """

    def refuses(_module: Any, placement: str) -> str:
        return "" if placement == "output" else f"it reads {reads}; its output can be conditioned"

    return refuses
