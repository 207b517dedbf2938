"""Specs: the text or mapping that selects a component. Standard library only; nothing is evaluated.

The text is the call subset of Python's expression grammar::

    spec  := name | name "(" key=value, ... ")"        name := identifier ("." identifier)*
    value := str | int | float | -number | bool | None | list | tuple | dict | spec
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from keyword import iskeyword
from typing import Any, Generic, TypeVar

from condmod.errors import SpecError

MAX_DEPTH = 32


Span = tuple[int, int]
Path = tuple[str | int, ...]
K = TypeVar("K")
V_co = TypeVar("V_co", covariant=True)


class FrozenMapping(Mapping[K, V_co], Generic[K, V_co]):
    """A mapping that cannot change and can be hashed; equality ignores the order of its keys."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[K, V_co] | Iterable[tuple[K, V_co]] = ()) -> None:
        self._items = dict(items)

    def __getitem__(self, key: K) -> V_co:
        return self._items[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._items,)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        keys, values = getattr(source, "__args__", None) or (Any, Any)
        inner = core_schema.dict_schema(handler(keys), handler(values))
        return core_schema.no_info_after_validator_function(
            cls,
            core_schema.no_info_before_validator_function(
                lambda value: dict(value) if isinstance(value, Mapping) else value, inner
            ),
            serialization=core_schema.plain_serializer_function_ser_schema(dict),
        )


@dataclass(frozen=True, slots=True)
class Source:
    """Where each part of a parsed text stands, by the path of keys that leads to it."""

    text: str
    values: Mapping[Path, Span]
    keys: Mapping[Path, Span]

    def point(self, path: Path, *, key: bool = False) -> str:
        """The line that holds `path` (or its nearest known parent) with a caret under it."""
        table = self.keys if key and path in self.keys else self.values
        while path and path not in table:
            path, table = path[:-1], self.values
        return point(self.text, table.get(path, (0, len(self.text))))


@dataclass(frozen=True, slots=True)
class Spec:
    """A component's name and its options, parsed but not yet validated.

    `str(spec)` is text that parses back to an equal spec. Lists and tuples are both read as
    tuples, mappings as frozen ones.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=FrozenMapping)
    source: Source | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", freeze(self.options))

    def __str__(self) -> str:
        return call(self.name, self.options)


def call(name: str, options: Mapping[str, Any]) -> str:
    """Spec text: `name` or `name(key=value, ...)`."""
    inside = ", ".join(f"{key}={show(value)}" for key, value in options.items())
    return f"{name}({inside})" if inside else name


def show(value: Any) -> str:
    """Spec text of a value; a component's config or spec shows itself by `str`."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(show, value)) + "]"
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    return str(value)


def is_name(word: Any) -> bool:
    """Whether a spec can say this component name."""
    return isinstance(word, str) and all(
        part.isascii() and part.isidentifier() and not iskeyword(part) for part in word.split(".")
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where something known is close to `word`, else nothing."""
    matches = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def point(text: str, span: Span) -> str:
    """The line of `text` that holds `span`, windowed to 100 columns, with carets below."""
    start, end = span
    line_start = text.rfind("\n", 0, start) + 1
    line_end = text.find("\n", start)
    line_end = len(text) if line_end < 0 else line_end
    left = max(line_start, min(start - 40, line_end - 100))
    right = min(line_end, left + 100)
    carets = max(1, min(end, right) - start)
    line = text[left:right].replace("\t", " ")
    return f"  {line}\n  {' ' * (start - left)}{'^' * carets}"


def freeze(value: Any, depth: int = 1) -> Any:
    """The same value with lists as tuples and mappings frozen, all the way down."""
    if depth > MAX_DEPTH:
        raise SpecError(f"a spec nests at most {MAX_DEPTH} levels deep; this one goes deeper")
    if isinstance(value, list | tuple):
        return tuple(freeze(item, depth + 1) for item in value)
    if isinstance(value, Mapping):
        return FrozenMapping({key: freeze(item, depth + 1) for key, item in value.items()})
    return value
