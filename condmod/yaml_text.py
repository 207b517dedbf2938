"""YAML as people mean it: 1e-3 is a number, a key that stands twice and an alias are errors."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from condmod.errors import SpecError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's numbers; PyYAML itself reads 1e-3 as text."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few lines of them can mean gigabytes
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"the alias *{event.anchor} is not read; write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.MarkedYAMLError(
                problem=f"the key {twice!r} stands twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Writes what the loader reads: no aliases, and quotes around text that reads as a number."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )


def read(path: Path) -> Any:
    """Read a YAML file, or a JSON file where its name ends in `.json`.

    Raises:
        SpecError: it cannot be read, or is no YAML or JSON; says the line and the column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SpecError(f"cannot read {str(path)!r}: {reason}") from None
    return (_parse_json if path.suffix == ".json" else parse)(text, repr(str(path)))


def parse(text: str, source: str) -> Any:
    """Read YAML text; `source` is what an error calls it.

    Raises:
        SpecError: it is no YAML; says the line and the column.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(f"{source}{where}: {error.problem or error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that cannot be, and such
        raise SpecError(f"{source}: {error}") from None
    except RecursionError:
        raise SpecError(f"{source}: it nests too deeply") from None


def dump(document: Any) -> str:
    """Write a document in the order of its keys."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse_json(text: str, source: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        where = f", line {error.lineno}, column {error.colno}"
        raise SpecError(f"{source}{where}: {error.msg}") from None
    except ValueError as error:
        raise SpecError(f"{source}: {error}") from None
    except RecursionError:
        raise SpecError(f"{source}: it nests too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ValueError(f"the key {twice!r} stands twice")
    return dict(pairs)


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number in JSON")
