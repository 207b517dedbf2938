"""YAML and JSON files: what people mean is read, and each mistake is told with its place."""

from pathlib import Path
from typing import Any

import pytest

from condmod import SpecError, yaml_text

DEEP = 5000
WRONG = {
    "an alias": (
        "a: &x [1]\nb: *x\n",
        "here, line 2, column 4: the alias *x is not read; write the value out",
    ),
    "a merged alias": (
        "a: &x {k: 1}\nb:\n  <<: *x\n",
        "here, line 3, column 7: the alias *x is not read; write the value out",
    ),
    "a loop": (
        "a: &x\n  - *x\n",
        "here, line 2, column 5: the alias *x is not read; write the value out",
    ),
    "a date that cannot be": ("a: 2020-13-45\n", "here: month must be in 1..12"),
    "depth without end": ("[" * DEEP, "here: it nests too deeply"),
    "a key twice": ("a: 1\na: 2\n", "here, line 1, column 1: the key 'a' stands twice"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_mistake_in_yaml_is_told_with_its_place(text: str, message: str):
    with pytest.raises(SpecError) as caught:
        yaml_text.parse(text, "here")
    assert str(caught.value) == message


def test_a_few_lines_of_aliases_cost_nothing():
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    with pytest.raises(SpecError, match=r"the alias \*a0 is not read"):
        yaml_text.parse(bomb, "here")


def test_an_anchor_alone_is_harmless():
    assert yaml_text.parse("a: &x [1]", "here") == {"a": [1]}


@pytest.mark.parametrize(
    "document", [{"a": "1e-3", "b": 1e-3, "c": "1.5", "d": "true", "e": None, "f": "*x"}]
)
def test_what_is_written_is_read_again(document: dict[str, Any]):
    again = yaml_text.parse(yaml_text.dump(document), "here")
    assert again == document
    assert {key: type(value) for key, value in again.items()} == {
        key: type(value) for key, value in document.items()
    }


def test_what_is_shared_is_written_out():
    part = [1, {"x": 2}]
    text = yaml_text.dump({"a": part, "b": part})
    assert "&" not in text
    assert yaml_text.parse(text, "here") == {"a": part, "b": part}


WRONG_JSON = {
    "a key twice": ('{"a": 1, "a": 2}', "{}: the key 'a' stands twice"),
    "not a number": ('{"a": NaN}', "{}: NaN is no number in JSON"),
    "half a document": ('{"a":', "{}, line 1, column 6: Expecting value"),
    "depth without end": ("[" * 100_000, "{}: it nests too deeply"),
    "YAML": ("a: 1", "{}, line 1, column 1: Expecting value"),
}


@pytest.mark.parametrize(("text", "message"), WRONG_JSON.values(), ids=WRONG_JSON)
def test_a_mistake_in_json_is_told_with_its_place(tmp_path: Path, text: str, message: str):
    path = tmp_path / "spec.json"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        yaml_text.read(path)
    assert str(caught.value) == message.format(repr(str(path)))
