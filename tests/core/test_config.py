"""Configs: strict, frozen, one error for one mistake, and the same through text, JSON and YAML."""

import copy
import json
import pickle
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import pytest
import torch
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from torch import Tensor

import condmod
from condmod import (
    DefinitionError,
    EncoderSpec,
    FrozenMapping,
    ModulatorSpec,
    Registry,
    Signal,
    SpecError,
    UnknownNameError,
    Width,
    configure,
    parse,
)
from condmod.parsing import MAX_LENGTH


class PulseConfig(condmod.NullableConfig):
    """Options of `pulse`."""

    dim: Width = 256
    """Number of features."""
    freqs: tuple[float, ...] = ()


class Pulse(condmod.Encoder[PulseConfig]):
    """An encoder that repeats its signal."""

    name = "pulse"
    Config = PulseConfig

    def encode(self, signal: Signal) -> Tensor:
        """The signal as a condition."""
        return torch.as_tensor(signal.value)[:, None].expand(-1, self.out_dim)

    def reset_parameters(self) -> None:
        """Draw the null."""
        self.reset_null()


class KindConfig(condmod.EncoderConfig):
    """Options of `kind`."""

    classes: Width


class Kind(condmod.Encoder[KindConfig]):
    """An encoder with an option that has no default."""

    name = "kind"
    Config = KindConfig

    def encode(self, signal: Signal) -> Tensor:
        """The signal as a condition."""
        return torch.zeros(len(signal.value), self.out_dim)

    def reset_parameters(self) -> None:
        """Draw nothing."""


class LeafConfig(condmod.ModulatorConfig):
    """Options of `leaf`."""

    scale: Literal["raw", "one_plus"] = "raw"
    hidden: tuple[Width, ...] = ()
    gain: float = 1.0


class Leaf(condmod.Modulator[LeafConfig, Tensor]):
    """The simplest modulator."""

    name = "leaf"
    Config = LeafConfig
    kinds: ClassVar[frozenset[Any]] = frozenset({"global"})

    def generate(self, condition: Any) -> Tensor:
        """The condition itself."""
        return condition

    def modulate(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The product of both."""
        return x * modulation

    def reset_parameters(self) -> None:
        """Draw nothing."""


class TreeConfig(condmod.ModulatorConfig):
    """Options of `tree`: every way in which a component may stand inside another."""

    inputs: FrozenMapping[str, EncoderSpec]
    inner: ModulatorSpec = "leaf"
    stages: tuple[ModulatorSpec, ...] = ()
    maybe: ModulatorSpec | None = None
    note: str = ""
    step: int | Literal["auto"] | tuple[int, ...] = "auto"
    weights: FrozenMapping[str, float] = FrozenMapping()
    width: Width | None = None

    @model_validator(mode="after")
    def _two_notes(self) -> Self:
        if self.note == "assert":
            raise AssertionError("a note asserts nothing")
        if self.note == "raise":
            raise ValueError("a note raises nothing")
        return self


class Tree(condmod.Modulator[TreeConfig, Tensor]):
    """A modulator that holds others."""

    name = "tree"
    Config = TreeConfig
    kinds: ClassVar[frozenset[Any]] = frozenset({"raw"})

    def generate(self, condition: Any) -> Tensor:
        """The condition itself."""
        return condition

    def modulate(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The product of both."""
        return x * modulation

    def reset_parameters(self) -> None:
        """Draw nothing."""


HERE = Registry([])
for component in (Pulse, Kind, Leaf, Tree):
    HERE.register(component)


@pytest.fixture(autouse=True)
def _looked_up_here() -> Iterator[None]:
    """Names mean this file's components, and nothing else is installed."""
    with HERE.active():
        yield


ROUND_TRIPS = [
    "leaf",
    "leaf(scale='one_plus')",
    "leaf(hidden=[1, 65536], gain=-0.001)",
    "leaf(gain=1e+300)",
    "tree(inputs={})",
    "tree(inputs={'time': pulse, 'label': kind(classes=10)})",
    "tree(inputs={'time': pulse(nullable=True, drop=0.1, freqs=[1e-05, -0.0])})",
    "tree(inputs={}, inner=tree(inputs={'a b': kind(classes=1)}, inner=leaf(hidden=[3])))",
    "tree(inputs={}, stages=[leaf(gain=2.0), leaf], maybe=leaf)",
    "tree(inputs={}, note='a | b \"q\" \\n ü \\x00', step=3, weights={'ü b': 3.0}, width=7)",
    "tree(inputs={}, step=[1, 2])",
]


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_a_config_comes_back_from_text_json_and_yaml_nested_components_included(text: str):
    config = configure(text)
    assert str(config) == text
    assert configure(str(config)) == config
    plain = config.model_dump(mode="json")
    for again in (
        configure(parse(text)),
        configure(json.loads(config.model_dump_json())),
        configure(json.loads(json.dumps(plain))),
        configure(yaml.safe_load(yaml.safe_dump(plain, sort_keys=False))),
        configure(config.model_dump()),
        configure(config),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert again == config
        assert hash(again) == hash(config)
        assert str(again) == text


_leaves = st.builds(
    LeafConfig,
    scale=st.sampled_from(["raw", "one_plus"]),
    hidden=st.lists(st.integers(1, 65536), max_size=3).map(tuple),
    gain=st.floats(allow_nan=False, allow_infinity=False),
)
_encoders = st.builds(KindConfig, classes=st.integers(1, 65536)) | st.builds(
    PulseConfig, nullable=st.just(True), drop=st.floats(0, 1)
)


@given(
    inputs=st.dictionaries(st.text(max_size=5), _encoders, max_size=3),
    inner=_leaves,
    stages=st.lists(_leaves, max_size=2).map(tuple),
    note=st.text(max_size=10),
    weights=st.dictionaries(st.text(max_size=5), st.floats(-1e300, 1e300), max_size=2),
)
def test_any_config_comes_back_from_text_json_and_yaml(**options: Any):
    with HERE.active():
        config = TreeConfig(**options)
        assume(len(str(config)) <= MAX_LENGTH)
        plain = config.model_dump(mode="json")
        assert configure(str(config)) == config
        assert configure(json.loads(config.model_dump_json())) == config
        assert configure(yaml.safe_load(yaml.safe_dump(plain, sort_keys=False))) == config


def test_a_plain_dump_keeps_the_names_of_nested_components():
    config = configure("tree(inputs={'a': kind(classes=2)}, maybe=leaf)")
    for plain in (config.model_dump(), config.model_dump(mode="json")):
        assert plain["name"] == "tree"
        assert plain["inputs"]["a"] == {"name": "kind", "classes": 2}
        assert plain["inner"]["name"] == plain["maybe"]["name"] == "leaf"


def test_the_text_of_a_config_shows_what_differs_from_the_defaults():
    assert str(configure("leaf(scale='raw', gain=1, hidden=())")) == "leaf"
    assert str(configure("tree(inputs={}, inner=leaf, note='leaf')")) == (
        "tree(inputs={}, note='leaf')"
    )


def test_equality_and_hash_look_at_values_and_not_at_how_they_were_given():
    one, other = configure("leaf"), configure("leaf(scale='raw', hidden=[], gain=1.0)")
    assert one == other
    assert hash(one) == hash(other)
    assert one != configure("leaf(gain=2.0)")
    assert configure("tree(inputs={'a': pulse, 'b': pulse})") == configure(
        "tree(inputs={'b': pulse, 'a': pulse})"
    )


def test_a_config_is_frozen_all_the_way_down():
    given_ = {"name": "tree", "inputs": {"a": "pulse"}, "stages": ["leaf"], "weights": {"w": 1.0}}
    config = configure(given_)
    assert isinstance(config, TreeConfig)
    with pytest.raises(ValidationError, match="frozen"):
        config.note = "x"  # type: ignore[misc]
    for mapping in (config.inputs, config.weights):
        with pytest.raises(TypeError):
            mapping["w"] = 2.0  # type: ignore[index]
    with pytest.raises(AttributeError):
        config.stages.append("leaf")  # type: ignore[attr-defined]
    given_["inputs"]["b"] = "pulse"  # type: ignore[index]
    given_["stages"].append("leaf")  # type: ignore[attr-defined]
    assert list(config.inputs) == ["a"]
    assert len(config.stages) == 1


def test_lists_become_tuples_and_mappings_frozen_ones_when_a_config_is_made_by_hand():
    assert LeafConfig(hidden=[1, 2]).hidden == (1, 2)  # type: ignore[arg-type]
    tree = TreeConfig(inputs={"a": "pulse"})  # type: ignore[arg-type]
    assert isinstance(tree.inputs, FrozenMapping)
    assert tree.inputs["a"] == PulseConfig()


ERRORS = {
    "True for an integer": (
        "pulse(dim=True)",
        "pulse: dim should be a valid integer; got True\n  pulse(dim=True)\n            ^^^^",
    ),
    "a float for an integer": (
        "pulse(dim=1.0)",
        "pulse: dim should be a valid integer; got 1.0\n  pulse(dim=1.0)\n            ^^^",
    ),
    "text for an integer": (
        "pulse(dim='1')",
        "pulse: dim should be a valid integer; got '1'\n  pulse(dim='1')\n            ^^^",
    ),
    "True for a float": (
        "pulse(nullable=True, drop=True)",
        "pulse: drop should be a valid number; got True\n"
        "  pulse(nullable=True, drop=True)\n                            ^^^^",
    ),
    "an integer for a bool": (
        "pulse(nullable=1)",
        "pulse: nullable should be a valid boolean; got 1\n  pulse(nullable=1)\n                 ^",
    ),
    "too small": (
        "pulse(dim=0)",
        "pulse: dim should be greater than or equal to 1; got 0\n  pulse(dim=0)\n            ^",
    ),
    "too large": (
        "pulse(dim=65537)",
        "pulse: dim should be less than or equal to 65536; got 65537\n"
        "  pulse(dim=65537)\n            ^^^^^",
    ),
    "an item of a list": (
        "pulse(freqs=[1, 'a'])",
        "pulse: freqs.1 should be a valid number; got 'a'\n"
        "  pulse(freqs=[1, 'a'])\n                  ^^^",
    ),
    "an unknown option": (
        "leaf(scael='raw')",
        "leaf has no option 'scael'; did you mean 'scale'?\n  leaf(scael='raw')\n       ^^^^^",
    ),
    "an option like none there is": (
        "leaf(zzz=1)",
        "leaf has no option 'zzz'; it has scale, hidden, gain\n  leaf(zzz=1)\n       ^^^",
    ),
    "a missing option": ("kind", "kind needs the option 'classes'\n  kind\n  ^^^^"),
    "a nearest choice": (
        "leaf(scale='one_pluss')",
        "leaf: scale should be 'raw' or 'one_plus'; got 'one_pluss'; did you mean 'one_plus'?\n"
        "  leaf(scale='one_pluss')\n             ^^^^^^^^^^^",
    ),
    "a word without quotes": (
        "leaf(scale=one_plus)",
        "leaf: scale should be 'raw' or 'one_plus'; got one_plus; a bare word names a "
        "component, so quote text: scale='one_plus'\n"
        "  leaf(scale=one_plus)\n             ^^^^^^^^",
    ),
    "a word where no text is wanted": (
        "leaf(gain=big)",
        "leaf: gain should be a valid number; got big\n  leaf(gain=big)\n            ^^^",
    ),
    "two mistakes": (
        "leaf(gain='x', hidden=3)",
        "leaf: hidden should be a valid tuple; got 3\n"
        "  leaf(gain='x', hidden=3)\n                        ^\n"
        "leaf: gain should be a valid number; got 'x'\n"
        "  leaf(gain='x', hidden=3)\n            ^^^",
    ),
    "an unknown name": (
        "leef",
        "no component is called 'leef'; did you mean 'leaf'?\n  leef\n  ^^^^",
    ),
    "an option of a nested component": (
        "tree(inputs={'time': pulse(dim='x')})",
        "pulse: dim should be a valid integer; got 'x'\n"
        "  tree(inputs={'time': pulse(dim='x')})\n                                 ^^^",
    ),
    "an unknown option of a nested component": (
        "tree(inputs={'time': pulse(dimm=4)})",
        "pulse has no option 'dimm'; did you mean 'dim'?\n"
        "  tree(inputs={'time': pulse(dimm=4)})\n                             ^^^^",
    ),
    "a missing option of a nested component": (
        "tree(inputs={'label': kind})",
        "kind needs the option 'classes'\n"
        "  tree(inputs={'label': kind})\n                        ^^^^",
    ),
    "a nested component in a list": (
        "tree(inputs={}, stages=[leaf, leaf(scael=1)])",
        "leaf has no option 'scael'; did you mean 'scale'?\n"
        "  tree(inputs={}, stages=[leaf, leaf(scael=1)])\n"
        "                                     ^^^^^",
    ),
    "a nested component that may be missing": (
        "tree(inputs={}, maybe=leaf(gain='x'))",
        "leaf: gain should be a valid number; got 'x'\n"
        "  tree(inputs={}, maybe=leaf(gain='x'))\n                                  ^^^",
    ),
    "two levels down": (
        "tree(inputs={}, inner=tree(inputs={'ü': pulse(dim=0)}))",
        "pulse: dim should be greater than or equal to 1; got 0\n"
        "  tree(inputs={}, inner=tree(inputs={'ü': pulse(dim=0)}))\n"
        "                                                    ^",
    ),
    "an unknown nested name": (
        "tree(inputs={'time': pulze})",
        "tree: no component is called 'pulze'; did you mean 'pulse'?\n"
        "  tree(inputs={'time': pulze})\n                       ^^^^^",
    ),
    "a modulator for an encoder": (
        "tree(inputs={'time': leaf})",
        "tree: 'leaf' is a modulator, not an encoder; encoders here: kind, pulse\n"
        "  tree(inputs={'time': leaf})\n                       ^^^^",
    ),
    "an encoder for a modulator": (
        "tree(inputs={}, inner=kind(classes=1))",
        "tree: 'kind' is an encoder, not a modulator; modulators here: leaf, tree\n"
        "  tree(inputs={}, inner=kind(classes=1))\n                        ^^^^",
    ),
    "a number for a component": (
        "tree(inputs={'time': 3})",
        "tree: a spec is text, a mapping or a config; got int: 3\n"
        "  tree(inputs={'time': 3})\n                       ^",
    ),
    "a nested component as quoted text": (
        "tree(inputs={'time': 'pulse(dim=[])'})",
        "pulse: dim should be a valid integer; got []\n  pulse(dim=[])\n            ^^",
    ),
    "quoted text that is no spec": (
        "tree(inputs={'time': 'pulse('})",
        "tree: this is not a spec: '(' was never closed\n  pulse(\n       ^\n"
        "  tree(inputs={'time': 'pulse('})\n                       ^^^^^^^^",
    ),
    "a component for a mapping": (
        "tree(inputs=pulse)",
        "tree: inputs should be a valid dictionary; got pulse\n"
        "  tree(inputs=pulse)\n              ^^^^^",
    ),
    "a union of types": (
        "tree(inputs={}, step=1.5)",
        "tree: step should be a valid integer or 'auto' or a valid tuple; got 1.5\n"
        "  tree(inputs={}, step=1.5)\n                       ^^^",
    ),
    "an item inside a union": (
        "tree(inputs={}, step=[1, 'x'])",
        "tree: step.1 should be a valid integer; got 'x'\n"
        "  tree(inputs={}, step=[1, 'x'])\n                           ^^^",
    ),
    "text that is no spec inside a union": (
        "tree(inputs={}, step='a b')",
        "tree: step should be a valid integer or 'auto' or a valid tuple; got 'a b'\n"
        "  tree(inputs={}, step='a b')\n                       ^^^^^",
    ),
    "a rule over several options": (
        "tree(inputs={'time': pulse(drop=0.1)})",
        "pulse: drop > 0 needs nullable=True: a dropped signal becomes the null\n"
        "  tree(inputs={'time': pulse(drop=0.1)})\n                       ^^^^^",
    ),
    "a rule that asserts": (
        "tree(inputs={}, note='assert')",
        "tree: a note asserts nothing\n  tree(inputs={}, note='assert')\n  ^^^^",
    ),
    "several lines": (
        "tree(\n  inputs={\n    'time': pulse(dim=0),\n  },\n)",
        "pulse: dim should be greater than or equal to 1; got 0\n"
        "      'time': pulse(dim=0),\n                        ^",
    ),
    "a mapping": (
        {"name": "leaf", "scale": "x"},
        "leaf: scale should be 'raw' or 'one_plus'; got 'x'",
    ),
    "a mapping inside a mapping": (
        {"name": "tree", "inputs": {"time": {"name": "pulse", "dim": "x"}}},
        "pulse: dim should be a valid integer; got 'x'\n  at inputs.time.dim",
    ),
    "an unknown option in a mapping": (
        {"name": "tree", "inputs": {"time": {"name": "pulse", "dimm": 1}}},
        "pulse has no option 'dimm'; did you mean 'dim'?\n  at inputs.time.dimm",
    ),
    "a mapping in a list": (
        {"name": "tree", "inputs": {}, "stages": ["leaf", {"name": "leaf", "gain": "x"}]},
        "leaf: gain should be a valid number; got 'x'\n  at stages.1.gain",
    ),
    "text inside a mapping": (
        {"name": "tree", "inputs": {"time": "pulse(dim=0)"}},
        "pulse: dim should be greater than or equal to 1; got 0\n  pulse(dim=0)\n            ^",
    ),
    "a nested mapping without a name": (
        {"name": "tree", "inputs": {"time": {"nam": "pulse"}}},
        "tree: a mapping that selects a component has its name as text under the key 'name', as "
        "in {'name': 'film'}; got the keys ['nam']\n  at inputs.time",
    ),
    "a key that is no text": (
        {"name": "tree", "inputs": {1: "pulse"}},
        "tree: a key of inputs should be a valid string; got 1\n  at inputs.1.[key]",
    ),
    "infinity in a mapping": (
        {"name": "leaf", "gain": float("inf")},
        "leaf: gain should be a finite number; got inf",
    ),
    "nan in a mapping": (
        {"name": "leaf", "gain": float("nan")},
        "leaf: gain should be a finite number; got nan",
    ),
    "a huge integer in a mapping": (
        {"name": "pulse", "dim": 10**40},
        f"pulse: dim should be less than or equal to 65536; got {10**40}",
    ),
    "long text": (
        {"name": "leaf", "gain": "x" * 1000},
        f"leaf: gain should be a valid number; got '{'x' * 79}",
    ),
}


@pytest.mark.parametrize(("spec", "message"), ERRORS.values(), ids=ERRORS)
def test_one_mistake_is_one_error_that_points_at_its_place(spec: Any, message: str):
    with pytest.raises(SpecError) as caught:
        configure(spec)
    assert str(caught.value) == message


def test_an_unknown_name_is_a_lookup_error_and_a_value_error():
    with pytest.raises(UnknownNameError) as caught:
        configure("leef")
    assert isinstance(caught.value, LookupError)
    assert isinstance(caught.value, ValueError)


def test_a_config_of_the_other_role_is_refused():
    with pytest.raises(SpecError) as caught:
        configure(LeafConfig(), role="encoder")
    assert str(caught.value) == "leaf is a modulator, not an encoder"
    with pytest.raises(SpecError) as caught:
        configure(KindConfig(classes=3), role="modulator")
    assert str(caught.value) == "kind(classes=3) is an encoder, not a modulator"


def test_a_config_made_by_hand_tells_mistakes_in_the_same_words():
    with pytest.raises(ValidationError) as caught:
        LeafConfig(scale="x")  # type: ignore[arg-type]
    (error,) = caught.value.errors(include_url=False)
    assert error["msg"] == "leaf: scale should be 'raw' or 'one_plus'; got 'x'"
    with pytest.raises(ValidationError) as caught:
        TreeConfig(inputs={"a": "pulse(dim=0)"})  # type: ignore[arg-type]
    (error,) = caught.value.errors(include_url=False)
    assert error["loc"] == ("inputs", "a")
    assert error["msg"] == (
        "pulse: dim should be greater than or equal to 1; got 0\n  pulse(dim=0)\n            ^"
    )


class Model(BaseModel):
    """A model of a user's own, with specs in it."""

    modulator: ModulatorSpec = "leaf"
    encoder: EncoderSpec = Field(default="pulse(dim=4)", description="the encoder of time")
    maybe: ModulatorSpec | None = None
    many: list[ModulatorSpec] = Field(default_factory=list)
    named: dict[str, EncoderSpec] = Field(default_factory=dict)
    rate: float = 1.0


def test_a_user_s_model_holds_configs_and_validates_its_default_text():
    model = Model()
    assert model.modulator == LeafConfig()
    assert model.encoder == PulseConfig(dim=4)


def test_a_user_s_model_accepts_text_mapping_and_config():
    for given_ in (
        "leaf(gain=2.0)",
        {"name": "leaf", "gain": 2.0},
        parse("leaf(gain=2.0)"),
        LeafConfig(gain=2.0),
    ):
        assert Model(modulator=given_).modulator == LeafConfig(gain=2.0)  # type: ignore[arg-type]


def test_a_user_s_model_comes_back_from_its_dump_and_its_json():
    model = Model(
        modulator="tree(inputs={'a': kind(classes=2)}, stages=[leaf(hidden=[1])])",
        maybe="leaf",
        many=["leaf", "leaf(gain=2.0)"],
        named={"time": "pulse"},
    )
    assert Model.model_validate(model.model_dump()) == model
    assert Model.model_validate_json(model.model_dump_json()) == model
    assert Model(**yaml.safe_load(yaml.safe_dump(model.model_dump(mode="json")))) == model


MODEL_ERRORS = {
    "a name": (
        {"modulator": "leef"},
        ("modulator",),
        "no component is called 'leef'; did you mean 'leaf'?\n  leef\n  ^^^^",
    ),
    "a role": (
        {"modulator": "pulse"},
        ("modulator",),
        "'pulse' is an encoder, not a modulator; modulators here: leaf, tree\n  pulse\n  ^^^^^",
    ),
    "a config of the other role": (
        {"modulator": PulseConfig()},
        ("modulator",),
        "pulse is an encoder, not a modulator",
    ),
    "a type": (
        {"maybe": 3},
        ("maybe",),
        "a spec is text, a mapping or a config; got int: 3",
    ),
    "an item": (
        {"many": ["leaf", "leaf(gain='x')"]},
        ("many", 1),
        "leaf: gain should be a valid number; got 'x'\n  leaf(gain='x')\n            ^^^",
    ),
    "a key": (
        {"named": {"time": {"name": "pulse", "dimm": 1}}},
        ("named", "time"),
        "pulse has no option 'dimm'; did you mean 'dim'?",
    ),
    "something nested": (
        {"modulator": "tree(inputs={'a': pulse(dim=0)})"},
        ("modulator",),
        "pulse: dim should be greater than or equal to 1; got 0\n"
        "  tree(inputs={'a': pulse(dim=0)})\n                              ^",
    ),
    "something nested in a mapping": (
        {"modulator": {"name": "tree", "inputs": {"a": {"name": "pulse", "dim": 0}}}},
        ("modulator",),
        "pulse: dim should be greater than or equal to 1; got 0\n  at inputs.a.dim",
    ),
}


@pytest.mark.parametrize(("fields", "place", "message"), MODEL_ERRORS.values(), ids=MODEL_ERRORS)
def test_a_user_s_model_keeps_the_place_of_a_mistake(
    fields: dict[str, Any], place: tuple[str | int, ...], message: str
):
    with pytest.raises(ValidationError) as caught:
        Model(**fields)
    (error,) = caught.value.errors(include_url=False)
    assert error["loc"] == place
    assert error["msg"] == message


def test_a_user_s_model_tells_a_wrong_spec_beside_its_other_mistakes():
    with pytest.raises(ValidationError) as caught:
        Model(modulator="leaf(", rate="x")  # type: ignore[arg-type]
    assert [error["loc"] for error in caught.value.errors()] == [("modulator",), ("rate",)]


def test_a_wrong_default_is_told_when_the_model_is_made():
    class Wrong(BaseModel):
        modulator: ModulatorSpec = "leef"

    with pytest.raises(ValidationError, match="did you mean 'leaf'"):
        Wrong()


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_a_user_s_model_has_a_json_schema_whose_fields_keep_their_own_defaults(mode: Any):
    properties = Model.model_json_schema(mode=mode)["properties"]
    assert properties["modulator"]["default"] == "leaf"
    assert properties["encoder"]["default"] == "pulse(dim=4)"
    assert properties["encoder"]["description"] == "the encoder of time"
    assert properties["modulator"]["x-condmod"] == "modulator"
    assert "default" not in properties["many"]["items"]
    assert "default" not in properties["maybe"]["anyOf"][0]
    text, mapping = properties["modulator"]["anyOf"]
    assert text == {"type": "string", "description": "spec text of a modulator"}
    assert mapping["required"] == ["name"]


def test_the_schema_of_a_config_says_type_bounds_and_description():
    schema = PulseConfig.model_json_schema()["properties"]["dim"]
    assert schema == {
        "default": 256,
        "description": "Number of features.",
        "maximum": 65536,
        "minimum": 1,
        "title": "Dim",
        "type": "integer",
    }


_SAYABLE = (
    "{}: an option is a plain ASCII identifier, neither 'name' nor a Python keyword, and has no "
    "alias, so that a spec can say it"
)
_FROZEN = (
    "{}: options are frozen all the way down, so {} is no option's type; use tuple for a list or "
    "set, FrozenMapping for a dict"
)
BAD_OPTIONS = {
    "called name": ({"name": (str, "x")}, _SAYABLE.format("BadConfig.name")),
    "called by a keyword": ({"class": (int, 1)}, _SAYABLE.format("BadConfig.class")),
    "not in ASCII": ({"größe": (int, 1)}, _SAYABLE.format("BadConfig.größe")),
    "with an alias": ({"a": (int, Field(1, alias="b"))}, _SAYABLE.format("BadConfig.a")),
    "with an alias for input": (
        {"a": (int, Field(1, validation_alias="b"))},
        _SAYABLE.format("BadConfig.a"),
    ),
    "with an alias for output": (
        {"a": (int, Field(1, serialization_alias="b"))},
        _SAYABLE.format("BadConfig.a"),
    ),
    "a list": ({"a": (list[int], [])}, _FROZEN.format("BadConfig.a", "list")),
    "a plain list": ({"a": (list, [])}, _FROZEN.format("BadConfig.a", "list")),
    "a dict": ({"a": (dict[str, int], {})}, _FROZEN.format("BadConfig.a", "dict")),
    "a set": ({"a": (set[int], set())}, _FROZEN.format("BadConfig.a", "set")),
    "a list inside": (
        {"a": (tuple[list[int], ...] | None, None)},
        _FROZEN.format("BadConfig.a", "list"),
    ),
    **{
        f"of the site, {name}": (
            {name: (int, 1)},
            f"BadConfig.{name}: the dimensions of a site are never options, so that one spec "
            "serves every layer of every model",
        )
        for name in ("features", "condition_dim", "channel_dim", "out_features", "site")
    },
}


@pytest.mark.parametrize(("fields", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_an_option_that_no_spec_can_say_is_refused_where_it_is_defined(
    fields: dict[str, Any], message: str
):
    with pytest.raises(DefinitionError) as caught:
        create_model("BadConfig", __base__=condmod.ModulatorConfig, **fields)
    assert str(caught.value) == message


def test_an_alias_from_a_generator_is_refused():
    with pytest.raises(DefinitionError, match="has no alias"):

        class AliasedConfig(condmod.ModulatorConfig):
            model_config = ConfigDict(alias_generator=str.upper)
            gain: int = 1


def test_an_encoder_may_call_the_width_of_its_raw_signal_features():
    config = create_model("RawConfig", __base__=condmod.EncoderConfig, features=(int, 1))
    assert config().features == 1  # type: ignore[attr-defined]


def _component(base: Any = condmod.Modulator, **attributes: Any) -> Any:
    """Define a component class as its author would."""
    config = create_model("OwnConfig", __base__=condmod.ModulatorConfig)
    body = {
        "name": "acme.own",
        "Config": config,
        "kinds": frozenset({"global"}),
        "generate": Leaf.generate,
        "modulate": Leaf.modulate,
        "reset_parameters": Leaf.reset_parameters,
        "__module__": __name__,
        "__qualname__": "Own",
        **attributes,
    }
    return type(base)("Own", (base,), {key: item for key, item in body.items() if item is not None})


def test_a_component_without_mistakes_is_defined():
    assert _component().Config.component.name == "acme.own"


BAD_COMPONENTS = {
    "no config": (
        {"Config": None},
        "Own (component 'acme.own') needs `Config = ...`, a subclass of ModulatorConfig of its "
        "own; got None",
    ),
    "a config of the other role": (
        {"Config": KindConfig},
        "Own (component 'acme.own') needs `Config = ...`, a subclass of ModulatorConfig of its "
        f"own; got {KindConfig!r}",
    ),
    "a config of another component": (
        {"Config": LeafConfig},
        "LeafConfig already belongs to Leaf; give Own a config class of its own",
    ),
    "forward overridden": (
        {"forward": Leaf.modulate},
        "Own.forward is final; see the contract",
    ),
    "no kinds": (
        {"kinds": None},
        "Own.kinds: a frozenset of some of raw, global, aligned, map, set, rows, self, as in "
        "frozenset({'global', 'aligned'})",
    ),
    "an unknown kind": (
        {"kinds": frozenset({"globul"})},
        "Own.kinds: a frozenset of some of raw, global, aligned, map, set, rows, self, as in "
        "frozenset({'global', 'aligned'})",
    ),
    "two kinds of one rank": (
        {"kinds": frozenset({"set", "aligned"})},
        "Own.kinds: aligned and set have one rank; a component takes one of them",
    ),
    "self and more": (
        {"kinds": frozenset({"self", "global"})},
        "Own.kinds: a component that reads the features alone takes no other condition",
    ),
    "raw and more": (
        {"kinds": frozenset({"raw", "global"})},
        "Own.kinds: a component that owns its encoder takes no other condition",
    ),
}


@pytest.mark.parametrize(("attributes", "message"), BAD_COMPONENTS.values(), ids=BAD_COMPONENTS)
def test_a_class_that_breaks_the_contract_is_refused_where_it_is_defined(
    attributes: dict[str, Any], message: str
):
    with pytest.raises(DefinitionError) as caught:
        _component(**attributes)
    assert str(caught.value) == message


def test_an_encoder_s_forward_is_final_too():
    with pytest.raises(DefinitionError, match=r"Own\.forward is final; see the contract"):
        _component(condmod.Encoder, Config=None, forward=Leaf.generate)


BAD_REGISTRATIONS = {
    "an abstract class": (
        lambda: _component(generate=None, modulate=None),
        "Own ('acme.own') does not implement generate, modulate",
    ),
    "a base of the contract": (
        lambda: condmod.Modulator,
        f"{condmod.Modulator!r} is no concrete Modulator or SublayerModulator with a `name`; "
        "subclass Modulator",
    ),
    "the base of encoders": (
        lambda: condmod.Encoder,
        f"{condmod.Encoder!r} is no concrete Encoder with a `name`",
    ),
    "a class without a name": (
        lambda: _component(name=None),
        f"<class '{__name__}.Own'> lacks a `name` of its own, as in name = 'acme.gate'",
    ),
    "another class": (
        lambda: int,
        "<class 'int'> is no concrete Modulator or SublayerModulator with a `name`",
    ),
    "no class": (
        lambda: 3,
        "3 is no concrete Modulator or SublayerModulator with a `name`",
    ),
    **{
        f"the name {name!r}": (
            lambda name=name: _component(name=name),
            "Own: a name is plain ASCII words with dots between, as in film or acme.gate; "
            f"got {name!r}",
        )
        for name in ("acme gate", "acme-gate", "acme.", "", "class", "größe", "1st")
    },
    "an alias that no spec can say": (
        lambda: _component(aliases=("acme-own",)),
        "Own: a name is plain ASCII words with dots between, as in film or acme.gate; "
        "got 'acme-own'",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_REGISTRATIONS.values(), ids=BAD_REGISTRATIONS)
def test_what_is_no_concrete_component_is_not_registered(make: Any, message: str):
    registry = Registry([])
    with pytest.raises(DefinitionError) as caught:
        registry.register(make())
    assert str(caught.value) == message
    assert len(registry) == 0


def test_a_component_that_subclasses_only_component_is_told_what_to_subclass():
    with pytest.raises(DefinitionError, match=r"; subclass Modulator$"):
        Registry([]).register(_component(condmod.Component, modulate=None))


TOO_LONG = (
    "tree: the text of these options is no spec: a spec has at most 4096 characters; got 6024"
)


def test_a_config_whose_text_is_no_spec_is_refused():
    note = chr(0xE000) * 1000  # its escapes take six letters each
    for spec in (f"tree(inputs={{}}, note='{note}')", {"name": "tree", "inputs": {}, "note": note}):
        with pytest.raises(SpecError) as caught:
            configure(spec)
        assert str(caught.value).split("\n")[0] == TOO_LONG
    with HERE.active(), pytest.raises(ValidationError, match=TOO_LONG):
        TreeConfig(inputs={}, note=note)
    short = configure({"name": "tree", "inputs": {}, "note": note[:600]})
    assert configure(str(short)) == short


def test_a_nested_config_whose_text_is_no_spec_is_told_where():
    with pytest.raises(SpecError) as caught:
        configure({"name": "tree", "inputs": {}, "inner": {"name": "leaf", "hidden": [1] * 2000}})
    assert str(caught.value).startswith("leaf: the text of these options is no spec: a spec has")
