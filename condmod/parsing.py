"""Reading specs: text by Python's own parser, then node by node; nothing is evaluated."""

import ast
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from condmod.errors import SpecError
from condmod.spec import MAX_DEPTH, FrozenMapping, Path, Source, Span, Spec, point

MAX_LENGTH = 4096
MAX_INTEGER = 2**63 - 1
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# What a text is made of, as far as Python's parser would warn about it: numbers and quoted text.
_TOKEN = re.compile(
    r"""
    (?P<number> 0[xX][0-9a-fA-F_]+ | 0[oO][0-7_]+ | 0[bB][01_]+
      | (?: [0-9][0-9_]* \.? [0-9_]* | \.[0-9][0-9_]* ) (?: [eE][-+]?[0-9][0-9_]* )? [jJ]? )
  | (?P<prefix> \w* ) (?P<quote> \'{3} | "{3} | \' | " )
  | \w+ | \#[^\n]* | .
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"[\n\\'\"abfnrtvxNuU]|[0-3][0-7]{0,2}|[4-7][0-7]?(?![0-7])")
_WARNED = re.compile(r"\\|[0-9]\.?[^\W0-9]")


def parse(spec: "str | Mapping[str, Any] | Spec") -> Spec:
    """Read a spec from text or from a mapping with the key `name`.

    Examples:
        >>> parse("film(scale='one_plus')")
        Spec(name='film', options={'scale': 'one_plus'})

    Raises:
        SpecError: the rule that was broken, what came, and where.
    """
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, str):
        return _Reader(spec.strip()).read()
    if isinstance(spec, Mapping):
        options = dict(spec)
        name = options.pop("name", None)
        if not isinstance(name, str):
            got = f"name={name!r:.80}" if "name" in spec else f"the keys {sorted(map(str, spec))}"
            raise SpecError(
                "a mapping that selects a component has its name as text under the key 'name', "
                f"as in {{'name': 'film'}}; got {got}"
            )
        for key in options:
            if not isinstance(key, str):
                raise SpecError(f"{name}: option names are text; got {key!r}")
        return Spec(name, options)
    raise SpecError(
        f"a spec is text, a mapping or a config; got {type(spec).__name__}: {spec!r:.80}"
    )


class _Reader:
    """Turns one text into a spec: parsed by Python's own parser, then read node by node."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.values: dict[Path, Span] = {}
        self.keys: dict[Path, Span] = {}
        if not text:
            raise SpecError("a spec is a name such as 'film'; got empty text")
        if len(text) > MAX_LENGTH:
            raise SpecError(f"a spec has at most {MAX_LENGTH} characters; got {len(text)}")
        self.line_starts = [0]
        for line in text.split("\n"):
            self.line_starts.append(self.line_starts[-1] + len(line) + 1)
        self.lines = text.split("\n")

    def read(self) -> Spec:
        root = self.tree()
        spec = self.spec(root, (), 1)
        return Spec(spec.name, spec.options, Source(self.text, self.values, self.keys))

    def tree(self) -> ast.expr:
        if _CONTROL.search(self.text):
            raise SpecError(f"a spec holds no control characters; got {self.text!a:.100}")
        self.refuse_what_warns()
        try:
            return ast.parse(self.text, mode="eval").body
        except SyntaxError as error:
            start = 0
            if error.lineno is not None and error.offset is not None:
                line = min(max(error.lineno, 1), len(self.lines)) - 1
                start = self.line_starts[line] + max(error.offset - 1, 0)
            span = (min(start, len(self.text)), min(start, len(self.text)) + 1)
            message = f"this is not a spec: {error.msg}"
        except (RecursionError, MemoryError):
            span, message = (0, 1), f"a spec nests at most {MAX_DEPTH} levels deep"
        raise SpecError(f"{message}\n{point(self.text, span)}") from None

    def refuse_what_warns(self) -> None:
        """Refuse what Python's parser reads with a warning, which is a matter of filters.

        That is an unknown escape, and a number run into a word. Where Python's tokens and these
        part (inside formatted text, behind a quote that is never closed), nothing parses.
        """
        place = 0
        while place < len(self.text):
            token = _TOKEN.match(self.text, place)
            assert token is not None
            place = token.end()
            if token["number"]:
                if re.match(r"\w", self.text[place : place + 1]):
                    self.refuse("this is not a spec: invalid decimal literal", place - 1, place)
            elif token["quote"]:
                prefix = token["prefix"].lower()
                if prefix in {"f", "fr", "rf", "t", "tr", "rt"} and _WARNED.search(
                    self.text, place
                ):
                    self.refuse("text is written as 'x' or r'x'", token.start(), place)
                place = self.end_of_text(place, token["quote"], prefix)

    def end_of_text(self, place: int, quote: str, prefix: str) -> int:
        """Where quoted text ends, behind its quote; refuses an escape that Python warns about."""
        while place < len(self.text) and not self.text.startswith(quote, place):
            if self.text[place] == "\n" and len(quote) == 1:
                break  # never closed: Python says so
            if self.text[place] == "\\":
                place += 1
                escape = _ESCAPE.match(self.text, place)
                of_bytes = "b" in prefix and self.text[place : place + 1] in {"N", "u", "U"}
                if place < len(self.text) and "r" not in prefix and (not escape or of_bytes):
                    shown = self.text[place - 1 : place + 1]
                    message = f"this is not a spec: invalid escape sequence '{shown}'"
                    self.refuse(message, place - 1, place + 1)
            place += 1
        return place + len(quote)

    def refuse(self, message: str, start: int, end: int) -> NoReturn:
        raise SpecError(f"{message}\n{point(self.text, (start, end))}")

    def offset(self, line: int, column: int) -> int:
        """Character offset of a position that ast counts in lines and UTF-8 bytes."""
        prefix = self.lines[line - 1].encode()[:column]
        return self.line_starts[line - 1] + len(prefix.decode())

    def span(self, node: ast.expr | ast.keyword) -> Span:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self.offset(node.lineno, node.col_offset),
            self.offset(node.end_lineno, node.end_col_offset),
        )

    def segment(self, node: ast.expr) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def fail(self, message: str, node: ast.expr | ast.keyword) -> NoReturn:
        raise SpecError(f"{message}\n{point(self.text, self.span(node))}")

    def name(self, node: ast.expr) -> str:
        parts: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name):
            self.fail("a name is written as in film or acme.gate", node)
        name = ".".join([inner.id, *reversed(parts)])
        if not name.isascii() or self.segment(node) != name:
            self.fail("a name is plain ASCII without spaces, as in film or acme.gate", node)
        return name

    def spec(self, node: ast.expr, path: Path, depth: int) -> Spec:
        if isinstance(node, ast.Name | ast.Attribute):
            self.values[path] = self.span(node)
            return Spec(self.name(node))
        if not isinstance(node, ast.Call):
            self.fail("a spec is a name, or a name with options in parentheses", node)
        name = self.name(node.func)
        if self.span(node)[0] != self.span(node.func)[0]:
            self.fail("a name is written without parentheses around it", node)
        self.values[path] = self.span(node.func)
        if node.args:
            self.fail(f"options are written as key=value, as in {name}(key=value)", node.args[0])
        options: dict[str, Any] = {}
        for keyword in node.keywords:
            key = keyword.arg
            if key is None:
                self.fail("options are written one by one, not as **mapping", keyword)
            start = self.span(keyword)[0]
            if not key.isascii() or not self.text.startswith(key, start):
                self.fail("an option's name is plain ASCII", keyword)
            if key in options:
                self.fail(f"{name} is given the option {key!r} twice", keyword)
            self.keys[(*path, key)] = (start, start + len(key))
            options[key] = self.value(keyword.value, (*path, key), depth + 1)
        return Spec(name, FrozenMapping(options))

    def value(self, node: ast.expr, path: Path, depth: int) -> Any:
        if depth > MAX_DEPTH:
            self.fail(f"a spec nests at most {MAX_DEPTH} levels deep", node)
        self.values[path] = self.span(node)
        match node:
            case ast.Constant():
                return self.constant(node)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                if not isinstance(number, bool):
                    return -self.number(number, node)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return tuple(
                    self.value(item, (*path, place), depth + 1) for place, item in enumerate(items)
                )
            case ast.Dict():
                return self.mapping(node, path, depth)
            case ast.Name() | ast.Attribute() | ast.Call():
                return self.spec(node, path, depth)
        self.fail(
            "a value is text, a number, True, False, None, a list, a dict or a spec; "
            f"got {self.segment(node)!r:.60}",
            node,
        )

    def constant(self, node: ast.Constant) -> Any:
        value = node.value
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int | float):
            return self.number(value, node)
        if isinstance(value, str):
            self.one_literal(node)
            return value
        self.fail(f"a value cannot be {type(value).__name__}", node)

    def number(self, value: float, node: ast.expr) -> float:
        if isinstance(value, int) and value > MAX_INTEGER:
            self.fail("an integer has at most 63 bits", node)
        if not math.isfinite(value):
            self.fail("a number is finite", node)
        return value

    def one_literal(self, node: ast.Constant) -> None:
        """Refuse adjacent strings: 'a' 'b' is more often a forgotten comma than a wish."""
        segment = self.segment(node)
        quote = segment.lstrip("rRuU")[:1]
        quote = quote * 3 if segment.lstrip("rRuU").startswith(quote * 3) else quote
        body = segment.lstrip("rRuU")[len(quote) :]
        place = 0
        while place < len(body) and not body.startswith(quote, place):
            place += 2 if body[place] == "\\" else 1
        if place + len(quote) != len(body):
            self.fail("two texts stand side by side; is a comma missing?", node)

    def mapping(self, node: ast.Dict, path: Path, depth: int) -> FrozenMapping[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in zip(node.keys, node.values, strict=True):
            if not isinstance(key_node, ast.Constant) or not isinstance(key_node.value, str):
                self.fail("the keys of a dict are quoted text", key_node or value_node)
            self.one_literal(key_node)
            key = key_node.value
            if key in result:
                self.fail(f"the key {key!r} stands twice", key_node)
            self.keys[(*path, key)] = self.span(key_node)
            result[key] = self.value(value_node, (*path, key), depth + 1)
        return FrozenMapping(result)
