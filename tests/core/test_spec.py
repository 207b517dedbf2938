"""The spec language: what parses, what each mistake is told, and that text comes back as itself."""

import copy
import pickle
import sys
import threading
import warnings
from keyword import iskeyword
from types import MappingProxyType

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from condmod import FrozenMapping, Spec, SpecError, parse
from condmod.parsing import MAX_INTEGER, MAX_LENGTH
from condmod.spec import MAX_DEPTH

PARSES = {
    "a name": ("film", Spec("film")),
    "a name with a namespace": ("acme.gate", Spec("acme.gate")),
    "empty parentheses": ("film()", Spec("film")),
    "space around": ("  film \n", Spec("film")),
    "text": ("f(a='x')", Spec("f", {"a": "x"})),
    "numbers": (
        "f(a=1, b=-2, c=0.5, d=-1e-5, e=1_000, g=0xff)",
        Spec("f", {"a": 1, "b": -2, "c": 0.5, "d": -1e-5, "e": 1000, "g": 255}),
    ),
    "the largest integer": (f"f(a={MAX_INTEGER})", Spec("f", {"a": MAX_INTEGER})),
    "the smallest integer": (f"f(a=-{MAX_INTEGER})", Spec("f", {"a": -MAX_INTEGER})),
    "constants": ("f(a=True, b=None)", Spec("f", {"a": True, "b": None})),
    "a list": ("f(a=[1, [2]])", Spec("f", {"a": (1, (2,))})),
    "a tuple": ("f(a=(1, 2))", Spec("f", {"a": (1, 2)})),
    "an empty tuple": ("f(a=())", Spec("f", {"a": ()})),
    "a dict": ("f(a={'x': 1})", Spec("f", {"a": FrozenMapping({"x": 1})})),
    "a spec": ("f(a=g, b=h.k(c=1))", Spec("f", {"a": Spec("g"), "b": Spec("h.k", {"c": 1})})),
    "specs in a dict": ("f(a={'x': g()})", Spec("f", {"a": FrozenMapping({"x": Spec("g")})})),
    "a trailing comma": ("f(a=1,)", Spec("f", {"a": 1})),
    "several lines": ("f(\n  a=1,\n\tb=2,\n)", Spec("f", {"a": 1, "b": 2})),
    "a raw string": (r"f(a=r'\d')", Spec("f", {"a": r"\d"})),
    "triple quotes": ("f(a='''x\ny''')", Spec("f", {"a": "x\ny"})),
    "escaped quotes": (r"f(a='it\'s', b='\\')", Spec("f", {"a": "it's", "b": "\\"})),
    "quotes inside quotes": ("""f(a="'a' 'b'")""", Spec("f", {"a": "'a' 'b'"})),
    "letters of the world": ("f(a='日本 ü')", Spec("f", {"a": "日本 ü"})),
    "soft keywords as options": ("f(match=1, type=2)", Spec("f", {"match": 1, "type": 2})),
}

WRONG = {
    "empty text": ("", "a spec is a name such as 'film'; got empty text"),
    "only space": (" \n ", "a spec is a name such as 'film'; got empty text"),
    "too long": ("x" * 4097, "a spec has at most 4096 characters; got 4097"),
    "a null byte": ("film\0x", r"a spec holds no control characters; got 'film\x00x'"),
    "a null byte in text": (
        "f(a='\0')",
        r'''a spec holds no control characters; got "f(a='\x00')"''',
    ),
    "a carriage return": ("f(\r\na=1)", r"a spec holds no control characters; got 'f(\r\na=1)'"),
    "a terminal's escape": (
        "f(a='\x1b[31m')",
        r'''a spec holds no control characters; got "f(a='\x1b[31m')"''',
    ),
    "half a surrogate pair": (
        "f(a='\ud800')",
        r'''a spec holds no control characters; got "f(a='\ud800')"''',
    ),
    "a constant for a name": (
        "None",
        "a spec is a name, or a name with options in parentheses\n  None\n  ^^^^",
    ),
    "a sum": (
        "film + film",
        "a spec is a name, or a name with options in parentheses\n  film + film\n  ^^^^^^^^^^^",
    ),
    "a ligature in a name": (
        "ﬁlm",
        "a name is plain ASCII without spaces, as in film or acme.gate\n  ﬁlm\n  ^^^",
    ),
    "a Greek name": (
        "π",
        "a name is plain ASCII without spaces, as in film or acme.gate\n  π\n  ^",
    ),
    "a ligature in an option": (
        "f(ﬁ=1)",
        "an option's name is plain ASCII\n  f(ﬁ=1)\n    ^^^",
    ),
    "a ligature in a nested name": (
        "f(a=ﬁlm)",
        "a name is plain ASCII without spaces, as in film or acme.gate\n  f(a=ﬁlm)\n      ^^^",
    ),
    "a space in a name": (
        "acme . gate",
        "a name is plain ASCII without spaces, as in film or acme.gate\n"
        "  acme . gate\n  ^^^^^^^^^^^",
    ),
    "a name in parentheses": (
        "(f)(a=1)",
        "a name is written without parentheses around it\n  (f)(a=1)\n  ^^^^^^^^",
    ),
    "a call of a call": (
        "f()()",
        "a name is written as in film or acme.gate\n  f()()\n  ^^^",
    ),
    "an import": (
        "__import__('os').system('x')",
        "a name is written as in film or acme.gate\n"
        "  __import__('os').system('x')\n  ^^^^^^^^^^^^^^^^^^^^^^^",
    ),
    "a positional option": (
        "f(1)",
        "options are written as key=value, as in f(key=value)\n  f(1)\n    ^",
    ),
    "a walrus": (
        "f(a:=1)",
        "options are written as key=value, as in f(key=value)\n  f(a:=1)\n    ^^^^",
    ),
    "a star": (
        "f(*a)",
        "options are written as key=value, as in f(key=value)\n  f(*a)\n    ^^",
    ),
    "two stars": (
        "f(a=1, **b)",
        "options are written one by one, not as **mapping\n  f(a=1, **b)\n         ^^^",
    ),
    "a generator": (
        "f(x for x in y)",
        "options are written as key=value, as in f(key=value)\n"
        "  f(x for x in y)\n   ^^^^^^^^^^^^^^",
    ),
    "an option twice": (
        "film(a=1, a=2)",
        "film is given the option 'a' twice\n  film(a=1, a=2)\n            ^^^",
    ),
    "a nested option twice": (
        "f(a=g(b=1, b=2))",
        "g is given the option 'b' twice\n  f(a=g(b=1, b=2))\n             ^^^",
    ),
    "a key twice": (
        "f(a={'x': 1, 'x': 2})",
        "the key 'x' stands twice\n  f(a={'x': 1, 'x': 2})\n               ^^^",
    ),
    "a key that is no text": (
        "f(a={1: 2})",
        "the keys of a dict are quoted text\n  f(a={1: 2})\n       ^",
    ),
    "stars in a dict": (
        "f(a={**b})",
        "the keys of a dict are quoted text\n  f(a={**b})\n         ^",
    ),
    "infinity": ("f(a=1e999)", "a number is finite\n  f(a=1e999)\n      ^^^^^"),
    "minus infinity": ("f(a=[-1e999])", "a number is finite\n  f(a=[-1e999])\n       ^^^^^^"),
    "a huge integer": (
        "f(a=9223372036854775808)",
        "an integer has at most 63 bits\n  f(a=9223372036854775808)\n      ^^^^^^^^^^^^^^^^^^^",
    ),
    "a huge negative integer": (
        "f(a=-9223372036854775808)",
        "an integer has at most 63 bits\n  f(a=-9223372036854775808)\n      ^^^^^^^^^^^^^^^^^^^^",
    ),
    "adjacent texts": (
        "f(a='x' 'y')",
        "two texts stand side by side; is a comma missing?\n  f(a='x' 'y')\n      ^^^^^^^",
    ),
    "adjacent texts without a space": (
        "f(a='x'\"y\")",
        "two texts stand side by side; is a comma missing?\n  f(a='x'\"y\")\n      ^^^^^^",
    ),
    "adjacent texts, one empty": (
        "f(a='' '')",
        "two texts stand side by side; is a comma missing?\n  f(a='' '')\n      ^^^^^",
    ),
    "adjacent texts as a key": (
        "f(a={'x' 'y': 1})",
        "two texts stand side by side; is a comma missing?\n  f(a={'x' 'y': 1})\n       ^^^^^^^",
    ),
    "bytes": ("f(a=b'x')", "a value cannot be bytes\n  f(a=b'x')\n      ^^^^"),
    "a complex number": ("f(a=1j)", "a value cannot be complex\n  f(a=1j)\n      ^^"),
    "an ellipsis": ("f(a=...)", "a value cannot be ellipsis\n  f(a=...)\n      ^^^"),
    **{
        f"the value {value}": (
            f"f(a={value})",
            "a value is text, a number, True, False, None, a list, a dict or a spec; "
            f"got {value!r}\n  f(a={value})\n      {'^' * len(value)}",
        )
        for value in (
            "f'x'",
            "-1j",
            "-True",
            "+1",
            "--1",
            "not 1",
            "1 + 1",
            "1 < 2",
            "x[0]",
            "{1, 2}",
            "lambda: 1",
            "[x for x in y]",
            "1 if a else 2",
            "await x",
        )
    },
    "a method of a value": (
        "f(a='x'.upper())",
        "a name is written as in film or acme.gate\n  f(a='x'.upper())\n      ^^^^^^^^^",
    ),
    "a call of a call as a value": (
        "f(a=g()())",
        "a name is written as in film or acme.gate\n  f(a=g()())\n      ^^^",
    ),
    "too deep": (
        "f(a=" + "[" * 32 + "]" * 32 + ")",
        f"a spec nests at most 32 levels deep\n  f(a={'[' * 32}{']' * 32})\n  {' ' * 35}^^",
    ),
    "4,000 minus signs": (
        f"f(a={'-' * 4000}1)",
        f"a spec nests at most 32 levels deep\n  f(a={'-' * 96}\n  ^",
    ),
}

# The words behind "this is not a spec" are Python's own; these are the same in every Python.
NOT_PYTHON = {
    "an open parenthesis": ("film(", "'(' was never closed\n  film(\n      ^"),
    "a stray parenthesis": ("film)", "unmatched ')'\n  film)\n      ^"),
    "a keyword as an option": ("f(class=1)", "invalid syntax\n  f(class=1)\n    ^"),
    "a keyword as a name": ("f.class", "invalid syntax\n  f.class\n    ^"),
    "a statement": ("import os", "invalid syntax\n  import os\n  ^"),
    "two lines": ("f\ng", "invalid syntax\n  g\n  ^"),
    "an assignment": ("a:=1", "invalid syntax\n  a:=1\n   ^"),
    "a number run into a word": (
        "f(a=1if b else 2)",
        "invalid decimal literal\n  f(a=1if b else 2)\n      ^",
    ),
    "a byte order mark": (
        "\ufefffilm",
        "invalid non-printable character U+FEFF\n  \ufefffilm\n  ^",
    ),
    "behind letters of two bytes": ("f(a='ü' $)", "invalid syntax\n  f(a='ü' $)\n          ^"),
}

OF_OTHER_TYPES = {
    "a number": (3, "a spec is text, a mapping or a config; got int: 3"),
    "nothing": (None, "a spec is text, a mapping or a config; got NoneType: None"),
    "bytes": (b"film", "a spec is text, a mapping or a config; got bytes: b'film'"),
    "a list": (["film"], "a spec is text, a mapping or a config; got list: ['film']"),
    "a mapping without a name": (
        {"nam": "film"},
        "a mapping that selects a component has its name as text under the key 'name', as in "
        "{'name': 'film'}; got the keys ['nam']",
    ),
    "a mapping whose name is a number": (
        {"name": 3},
        "a mapping that selects a component has its name as text under the key 'name', as in "
        "{'name': 'film'}; got name=3",
    ),
    "a mapping with a number as option": (
        {"name": "film", 3: 4},
        "film: option names are text; got 3",
    ),
}


@pytest.mark.parametrize(("text", "spec"), PARSES.values(), ids=PARSES)
def test_the_grammar_is_the_call_subset_of_python(text: str, spec: Spec):
    assert parse(text) == spec


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_told_by_its_rule_and_a_caret(text: str, message: str):
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(("text", "message"), NOT_PYTHON.values(), ids=NOT_PYTHON)
def test_what_python_cannot_read_is_told_in_python_s_words_with_a_caret(text: str, message: str):
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert str(caught.value) == f"this is not a spec: {message}"


@pytest.mark.parametrize(("given_", "message"), OF_OTHER_TYPES.values(), ids=OF_OTHER_TYPES)
def test_what_is_neither_text_nor_mapping_is_refused(given_: object, message: str):
    with pytest.raises(SpecError) as caught:
        parse(given_)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_an_unknown_escape_is_an_error_and_no_warning():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(SpecError, match="this is not a spec"):
            parse(r"f(a='\d')")
    assert heard == []


@pytest.mark.parametrize("count", [100, 1000, 4090])
@pytest.mark.parametrize("sign", ["-", "not ", "(", "[", "a.", "a+", "f(a="])
def test_no_depth_of_nesting_escapes_the_error_tree(sign: str, count: int):
    text = f"f(a={sign * count}1)"[:MAX_LENGTH]
    with pytest.raises(SpecError):
        parse(text)


WARNED = {
    "a word behind a number": (
        "f(a=0x1for b)",
        "this is not a spec: invalid decimal literal\n  f(a=0x1for b)\n         ^",
    ),
    "a word behind a point": (
        "f(a=1.if b else 2)",
        "this is not a spec: invalid decimal literal\n  f(a=1.if b else 2)\n       ^",
    ),
    "an unknown escape": (
        r"f(a='ü\d')",
        "this is not a spec: invalid escape sequence '\\d'\n  f(a='ü\\d')\n        ^^",
    ),
    "an octal escape past a byte": (
        r"f(a='\477')",
        "this is not a spec: invalid escape sequence '\\4'\n  f(a='\\477')\n       ^^",
    ),
    "an escape of text in bytes": (
        r"f(a=b'\N')",
        "this is not a spec: invalid escape sequence '\\N'\n  f(a=b'\\N')\n        ^^",
    ),
    "formatted text that warns": (
        "f(a=f'{1if x else 2}')",
        "text is written as 'x' or r'x'\n  f(a=f'{1if x else 2}')\n      ^^",
    ),
    "an escape behind a comment": (
        "f(a=1, # it's r'\n  b='\\d')",
        "this is not a spec: invalid escape sequence '\\d'\n    b='\\d')\n       ^^",
    ),
    "an escape in three quotes": (
        "f(a='''it's\n\\d''')",
        "this is not a spec: invalid escape sequence '\\d'\n  \\d''')\n  ^^",
    ),
}


@pytest.mark.parametrize(("text", "message"), WARNED.values(), ids=WARNED)
def test_what_python_reads_with_a_warning_is_an_error(text: str, message: str):
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert str(caught.value) == message


NOT_WARNED = {
    "numbers next to names": ("f(a2=0x1F, b=1_0.5e+3, c=.5, d=5., e=1e5)", 31),
    "every escape": (
        r"f(a2='\\\'\"\a\b\f\n\r\t\v\0\47\377\x41\u00e9\U0001F600\N{DIGIT ONE}')",
        None,
    ),
    "a raw backslash": (r"f(a2=r'\d', b=R'\'')", r"\d"),
    "a comment": ("f(a2=1) # it's 1if \\d", 1),
    "a line that goes on": ("f(a2=\\\n1)", 1),
}


@pytest.mark.parametrize(("text", "value"), NOT_WARNED.values(), ids=NOT_WARNED)
def test_what_python_reads_without_a_warning_parses(text: str, value: object):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = parse(text).options
    assert value is None or options["a2"] == value


def test_parsing_never_touches_the_warning_filters(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warnings, "catch_warnings", None)
    monkeypatch.setattr(warnings, "simplefilter", None)
    assert parse(r"f(a='\n', b2=1)").options["a"] == "\n"
    with pytest.raises(SpecError):
        parse(r"f(a='\d')")


def test_a_text_of_the_greatest_length_parses():
    assert parse("x" * MAX_LENGTH) == Spec("x" * MAX_LENGTH)


def test_the_greatest_depth_is_the_same_for_text_and_mapping():
    deepest = MAX_DEPTH - 1  # the component is the first level
    value: object = 1
    for _ in range(deepest - 1):
        value = [value]
    assert parse(str(parse({"name": "f", "a": value}))) == parse({"name": "f", "a": value})
    with pytest.raises(SpecError, match="nests at most 32 levels deep"):
        parse({"name": "f", "a": [value]})
    with pytest.raises(SpecError, match="nests at most 32 levels deep"):
        parse("f(a=" + "[" * deepest + "1" + "]" * deepest + ")")


def test_a_mapping_that_holds_itself_is_an_error():
    loop: dict[str, object] = {"name": "f"}
    loop["a"] = loop
    with pytest.raises(SpecError) as caught:
        parse(loop)
    assert str(caught.value) == "a spec nests at most 32 levels deep; this one goes deeper"


def test_a_low_limit_on_digits_is_an_error_of_the_spec():
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        with pytest.raises(SpecError):
            parse(f"f(a={'9' * 700})")
    finally:
        sys.set_int_max_str_digits(limit)


def test_a_bool_stays_a_bool():
    assert parse("f(a=True)").options["a"] is True
    assert type(parse("f(a=1)").options["a"]) is int


def test_the_caret_counts_letters_and_not_bytes_on_its_own_line():
    with pytest.raises(SpecError) as caught:
        parse("f(a='日本',\n\tb='üü', c=1, c=2)")
    assert str(caught.value) == (
        "f is given the option 'c' twice\n   b='üü', c=1, c=2)\n                ^^^"
    )


def test_a_long_line_is_shown_around_the_caret():
    with pytest.raises(SpecError) as caught:
        parse(f"f(a='{'x' * 200}', b=1, b=2, c='{'y' * 200}')")
    rule, line, carets = str(caught.value).split("\n")
    assert rule == "f is given the option 'b' twice"
    assert len(line) == 102
    assert line[carets.index("^") :].startswith("b=2")


def test_a_mistake_over_several_lines_is_pointed_at_where_it_begins():
    with pytest.raises(SpecError) as caught:
        parse("f(a={1,\n2})")
    assert str(caught.value) == (
        "a value is text, a number, True, False, None, a list, a dict or a spec; "
        "got '{1,\\n2}'\n  f(a={1,\n      ^^^"
    )


def test_lists_and_mappings_are_frozen_however_a_spec_is_made():
    options = {"a": [1, {"x": [2]}]}
    for spec in (
        Spec("f", options),
        parse({"name": "f", **options}),
        parse("f(a=[1, {'x': [2]}])"),
    ):
        assert spec.options["a"] == (1, FrozenMapping({"x": (2,)}))
        assert isinstance(hash(spec), int)
        with pytest.raises(TypeError):
            spec.options["a"] = 1  # type: ignore[index]
    options["a"].append(3)
    assert Spec("f", {"a": [1]}) == Spec("f", {"a": (1,)})


def test_a_mapping_of_any_kind_selects_a_component():
    assert parse(MappingProxyType({"name": "f", "a": 1})) == parse("f(a=1)")


def test_a_spec_is_parsed_to_itself():
    spec = parse("f(a=1)")
    assert parse(spec) is spec


def test_a_spec_survives_copies_and_pickle():
    spec = parse("f(a=[1], b={'x': g(c=2)})")
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.deepcopy(spec) == spec


def test_the_repr_of_a_spec_shows_name_and_options():
    assert repr(parse("film(scale='raw')")) == "Spec(name='film', options={'scale': 'raw'})"


def test_frozen_mappings_are_equal_whatever_the_order_of_their_keys():
    one, other = FrozenMapping({"a": 1, "b": 2}), FrozenMapping([("b", 2), ("a", 1)])
    assert one == other
    assert hash(one) == hash(other)
    assert one == {"a": 1, "b": 2}
    assert list(other) == ["b", "a"]
    assert repr(one) == "{'a': 1, 'b': 2}"


words = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,6}", fullmatch=True).filter(
    lambda word: not iskeyword(word)
)
names = st.lists(words, min_size=1, max_size=3).map(".".join)
letters = st.text(st.characters(), max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-MAX_INTEGER, MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | letters
)


def _specs(values: st.SearchStrategy[object]) -> st.SearchStrategy[Spec]:
    return st.builds(Spec, names, st.dictionaries(words, values, max_size=3))


values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(letters, inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | _specs(inner)
    ),
    max_leaves=8,
)


@given(_specs(values))
def test_the_text_of_a_spec_parses_back_to_it(spec: Spec):
    text = str(spec)
    assume(len(text) <= MAX_LENGTH)
    assert parse(text) == spec
    assert str(parse(text)) == text


@given(
    st.text(st.characters())
    | st.text("fa=(),.'\"{}[]:-+*10e_\\\n\t #ü", max_size=40).map(lambda text: f"f(a={text})")
)
@example("f(a='\\N{DIGIT ONE}')")
@example("f(a=''''x''')")
@example("f(a=u'x' r'y')")
def test_any_text_parses_or_is_a_spec_error_and_nothing_else(text: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            spec = parse(text)
        except SpecError as error:
            str(error).encode()  # can be printed
        else:
            assert parse(str(spec)) == spec
            assert str(parse(str(spec))) == str(spec)


@given(_specs(values), st.data())
def test_one_changed_letter_parses_or_is_a_spec_error(spec: Spec, data: st.DataObject):
    text = str(spec)
    assume(len(text) < MAX_LENGTH)
    place = data.draw(st.integers(0, len(text)))
    text = text[:place] + data.draw(st.characters()) + text[place + data.draw(st.booleans()) :]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            parse(text)
        except SpecError as error:
            str(error).encode()


@given(letters, letters)
def test_the_caret_stands_under_the_option_whatever_letters_precede_it(one: str, other: str):
    text = f"f(a={one!r},\n\tc={other!r}, b=1, b=2)"
    with pytest.raises(SpecError) as caught:
        parse(text)
    _, line, carets = str(caught.value).split("\n")
    assert line[carets.index("^") :] == "b=2)"


def test_the_text_of_a_spec_may_grow_past_the_limit_of_text_but_not_of_mappings():
    spec = parse(f"f(a='{chr(0xE000) * 1000}')")  # repr escapes each letter to six
    with pytest.raises(SpecError, match="a spec has at most 4096 characters; got 6007"):
        parse(str(spec))
    assert parse({"name": spec.name, **spec.options}) == spec


def test_threads_that_parse_leave_the_warning_filters_as_they_were():
    before = list(warnings.filters)
    failures: list[Exception] = []

    def work() -> None:
        for _ in range(300):
            try:
                parse("f(a=1, b=[g])")
            except Exception as error:  # noqa: BLE001  whatever a thread raises
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(warnings.filters) == before
