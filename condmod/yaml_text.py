"""YAML as people mean it: 1e-3 is a number, and a key that stands twice is an error."""

import re
from pathlib import Path
from typing import Any

import yaml

from condmod.errors import SpecError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's numbers; PyYAML itself reads 1e-3 as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.MarkedYAMLError(
                problem=f"the key {twice!r} stands twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        SpecError: it cannot be read, or is no YAML; says the line and the column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SpecError(f"cannot read {str(path)!r}: {reason}") from None
    return parse(text, repr(str(path)))


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
    except yaml.YAMLError as error:
        raise SpecError(f"{source}: {error}") from None


def dump(document: Any) -> str:
    """Write a document in the order of its keys."""
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
