"""Which modules of a model a pattern names: dotted globs, `re:` and `type:`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping

from torch import nn

from condmod.errors import SiteError
from condmod.spec import nearest

_HOW = (
    "a pattern is a dotted name in which * stands for a part of one segment and ** for any "
    "segments, as in 'blocks.*.norm1' or '**.norm1'; or 're:' and a regular expression for the "
    "whole name; or 'type:' and a class, as in 'type:LayerNorm'"
)
_STARS = 4  # more could take for ever to match
_COMPILED = "_orig_mod"  # how torch.compile names what it wraps


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module below the model by its dotted name; torch.compile's wrapper has no name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        plain = plain_name(name)
        if plain and name.endswith(f".{_COMPILED}"):
            found[plain] = module  # what is compiled, and not what compiles it
        elif plain:
            found.setdefault(plain, module)
    return found


def plain_name(name: str) -> str:
    """A dotted name without the segments that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def match(pattern: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The names that a pattern matches, in the model's order.

    Raises:
        SiteError: it is no pattern, or nothing matches it.
    """
    reads = reader(pattern)
    found = [name for name, module in modules.items() if reads(name, module)]
    if not found:
        raise SiteError(f"the pattern {pattern!r} matches no module{_mend(pattern, modules)}")
    return found


def reader(pattern: str) -> Callable[[str, nn.Module | None], bool]:
    """What tells whether a name, and for `type:` its module, is meant.

    Raises:
        SiteError: it is no pattern.
    """
    if not isinstance(pattern, str):
        raise SiteError(f"{_HOW}; got {pattern!r:.80}")
    kind, _, rest = pattern.partition(":")
    if kind == "type" and rest:
        where, _, short = rest.rpartition(".")
        public = getattr(sys.modules.get(where), short, None)  # as torch.nn.LayerNorm
        return lambda _name, module: (
            rest in _classes(type(module))
            or (isinstance(public, type) and isinstance(module, public))
        )
    if kind == "re" and rest:
        try:
            expression = re.compile(rest)
        except re.error as error:
            raise SiteError(f"the pattern {pattern!r} is no regular expression: {error}") from None
        return lambda name, _module: expression.fullmatch(name) is not None
    segments = pattern.split(".")
    if not all(segments) or not all(re.fullmatch(r"[\w*/\-]+", segment) for segment in segments):
        raise SiteError(f"{pattern!r} is no pattern: {_HOW}")
    if any(segment.count("*") > _STARS and segment.strip("*") for segment in segments):
        raise SiteError(f"{pattern!r} is no pattern: a segment has at most {_STARS} stars")
    glob = _glob(pattern)
    return lambda name, _module: glob.fullmatch(name) is not None


def _classes(cls: type) -> set[str]:
    """The names of a class and its bases, short and with their module."""
    bases = [base for base in cls.__mro__ if base not in (nn.Module, object)]
    return {
        name for base in bases for name in (base.__name__, f"{base.__module__}.{base.__qualname__}")
    }


def _glob(pattern: str) -> re.Pattern[str]:
    """The expression of a glob: ** takes whole segments, and none of them too."""
    parts = ""
    segments = pattern.split(".")
    for place, segment in enumerate(segments):
        last = place == len(segments) - 1
        if segment == "**":
            parts += r"[^.]+(?:\.[^.]+)*" if last else r"(?:[^.]+\.)*"
            continue
        stars = re.sub(r"\*+", "*", segment)
        parts += re.escape(stars).replace(r"\*", "[^.]*") + ("" if last else r"\.")
    return re.compile(parts)


def _mend(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    """What is there instead, as deep as the pattern still matches."""
    kind, _, rest = pattern.partition(":")
    if kind == "type":
        classes = sorted({cls.__name__ for cls in map(type, modules.values())})
        return nearest(rest.rpartition(".")[2], classes) or f"; it has {', '.join(classes):.200}"
    if kind == "re":
        return f"; the model has {', '.join(modules):.200}"
    segments = pattern.split(".")
    for depth in range(len(segments) - 1, -1, -1):
        start = ".".join(segments[:depth])
        above = next((name for name in modules if reader(start)(name, None)), None) if depth else ""
        if above is None:
            continue
        below = [name for name in modules if name.rpartition(".")[0] == above]
        words = [name.rpartition(".")[2] for name in below]
        if mend := nearest(segments[depth], words):
            return _spelt(mend, start) if start else mend
        listed = ", ".join(words) or "nothing below it"
        return f"; {repr(above) if above else 'the model'} has {listed:.200}"
    return ""


def _spelt(mend: str, start: str) -> str:
    """The nearest name with the part of the pattern that matched in front of it."""
    return re.sub(r"'([^']+)'", lambda found: repr(f"{start}.{found[1]}"), mend)
