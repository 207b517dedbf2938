"""The training config: validated from YAML, with overrides from the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self, get_args

from pydantic import BaseModel, Field, ValidationError

from condmod import EncoderSpec, ModulatorSpec, yaml_text
from condmod_lab.errors import ConfigError
from condmod_lab.sections import (
    BackboneConfig,
    ConvConfig,
    DataConfig,
    DigitsConfig,
    SamplingConfig,
    Section,
    TrainingConfig,
)

_SPEC_FIELDS: Final = ("modulator", "encoder")
_UNDECIDING: Final = ("output", "training.sharding")  # where and on what a run is, not what it is
_CHOICES: Final = ("backbone", "data")  # pydantic puts the chosen variant's name behind these


class TrainConfig(Section):
    """A whole run: what conditions the network, how it learns, where the results go."""

    modulator: ModulatorSpec = "dense_film"
    """The modulator of every block."""
    encoder: EncoderSpec | None = None
    """The encoder of {'time': ..., 'label': ...}, the condition of every modulator; where none is
    named, the sum of a timestep's and a label's embedding."""
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Decides every random draw of a run."""
    output: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")] = "runs/digits"
    """The run folder."""
    data: DataConfig = DigitsConfig()
    """The images and their labels."""
    backbone: BackboneConfig = ConvConfig()
    """The network."""
    training: TrainingConfig = TrainingConfig()
    """The optimisation."""
    sampling: SamplingConfig = SamplingConfig()
    """How samples are drawn."""
    trackers: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Where else accelerate reports to, by its names: tensorboard, wandb, mlflow, ..."""

    def resolve(self, classes: int) -> Self:
        """The config with its encoder spelled out, for data of that many classes."""
        if self.encoder is not None:
            return self
        return type(self).model_validate(
            {**self.model_dump(mode="json"), "encoder": _default_encoder(classes)}
        )

    def to_yaml(self) -> str:
        """The resolved config, every option spelled out; `load_config` reads it back."""
        return yaml_text.dump(self.model_dump(mode="json"))


def load_config(path: Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read a config from a YAML file.

    Args:
        path: the file.
        overrides: `key=value` with dotted keys, as in "training.steps=500".

    Raises:
        SpecError: the file, the field, the rule, what came, the nearest name.
    """
    document = yaml_text.read(path)
    if not isinstance(document, dict):
        raise ConfigError(
            f"the config {str(path)!r} holds fields such as 'modulator: film'; "
            f"got {type(document).__name__}"
        )
    return make_config(document, overrides, source=f"the config {str(path)!r}")


def make_config(
    document: Mapping[str, Any], overrides: Iterable[str] = (), *, source: str = "the config"
) -> TrainConfig:
    """Validate a mapping of fields, after overriding some of them.

    Raises:
        ConfigError: every wrong field with the rule, what came, the nearest name.
    """
    changed = dict(document)
    for override in overrides:
        _override(changed, override)
    try:
        return TrainConfig.model_validate(changed)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors(include_url=False)]
    raise ConfigError(f"{source} is wrong:\n" + "\n".join(lines))


def differences(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """Every field that decides a run and differs: "  key: theirs, not ours"."""
    left, right = flat(ours), flat(theirs)
    return [
        f"  {key}: {right.get(key, 'nothing')}, not {left.get(key, 'nothing')}"
        for key in dict.fromkeys([*left, *right])
        if key not in _UNDECIDING and left.get(key) != right.get(key)
    ]


def flat(config: TrainConfig) -> dict[str, Any]:
    """Every field by its dotted key, down to the options of components."""
    return dict(_leaves(config.model_dump(mode="json")))


def _leaves(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _override(document: dict[str, Any], override: str) -> None:
    """Set one dotted key of nested mappings, copying each mapping on the way."""
    key, equals, text = override.partition("=")
    known = list(dict.fromkeys(_keys(TrainConfig)))
    if not equals:
        raise ConfigError(f"--set takes key=value, as in training.steps=500; got {override!r}")
    if key not in known:
        owner, inside = key.split(".")[0], [name for name in known if name.startswith(f"{key}.")]
        if owner in _SPEC_FIELDS:
            mend = f"; {owner} is one spec, set it as a whole, as in {owner}='film(scale=...)'"
        elif inside:
            mend = f"; set one of {', '.join(inside)}"
        else:
            mend = _nearest(key, known)
        raise ConfigError(f"--set {override}: a config has no field {key!r}{mend}")
    *parents, leaf = key.split(".")
    for parent in parents:
        section = document.get(parent, {})
        if parent in _CHOICES and leaf == "name" and isinstance(section, Mapping):
            before = section.get("name", TrainConfig.model_fields[parent].default.name)
            section = section if before == text else {}  # its fields would not fit another's
        document[parent] = document = dict(section) if isinstance(section, Mapping) else {}
    is_spec_text = key in _SPEC_FIELDS and not text.lstrip().startswith("{")
    document[leaf] = text if is_spec_text else yaml_text.parse(text, f"--set {override}")


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a section; of a choice of sections those of each, some of them twice."""
    for name, field in section.model_fields.items():
        inner = _sections(field.annotation)
        for kind in inner:
            yield from _keys(kind, f"{prefix}{name}.")
        if not inner:
            yield prefix + name


def _sections(annotation: Any) -> list[type[Section]]:
    """The section that a field is, or those that it may be."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [kind for argument in get_args(annotation) for kind in _sections(argument)]


def _nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where a dotted key ends close to how `word` does, else nothing."""
    section, _, leaf = word.rpartition(".")
    leaves = {name: name.rpartition(".")[2] for name in known}
    close = difflib.get_close_matches(leaf, leaves.values(), n=1, cutoff=0.5)
    fitting = [name for name in leaves if leaves[name] in close]
    beside = [name for name in fitting if name.rpartition(".")[0] == section]
    words = " or ".join(map(repr, beside or fitting))
    return f"; did you mean {words}?" if words else ""


def _explain(error: Any) -> str:
    first, *rest = map(str, error["loc"])
    place = ".".join([first, *(rest[1:] if first in _CHOICES else rest)])
    if error["type"] == "extra_forbidden":
        other = _variant_with(first, rest[-1]) if first in _CHOICES else ""
        mend = f"; it is one of {first}.name={other}" if other else None
        return f"  {place}: no such field{mend or _nearest(place, _keys(TrainConfig))}"
    if error["type"] == "tuple_type":
        return f"  {place}: should be a list; got {error['input']!r:.80}"
    if error["type"] == "missing":
        return f"  {place}: required; got no value"
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        return f"  {place}.name: should be {context['expected_tags']}; got {context['tag']!r}"
    if first in _SPEC_FIELDS:  # condmod has said what is wrong
        return f"  {place}: {error['msg']}".replace("\n", "\n  ")
    if error["type"] == "value_error":
        return f"  {place}: {error['ctx']['error']}"
    if error["type"] == "model_type":
        return f"  {place}: should be a mapping of fields; got {error['input']!r:.80}"
    rule = error["msg"].replace("Input should", "should", 1)
    return f"  {place}: {rule}; got {error['input']!r:.80}"


def _variant_with(choice: str, field: str) -> str:
    """The variants of a choice that have a field."""
    kinds = _sections(TrainConfig.model_fields[choice].annotation)
    return " or ".join(
        get_args(kind.model_fields["name"].annotation)[0]
        for kind in kinds
        if field in kind.model_fields
    )


def _default_encoder(classes: int) -> str:
    return (
        "fuse(inputs={'time': timestep(dim=64, scale=1000.0, hidden=[64]), "
        f"'label': label(classes={classes}, std=1.0, nullable=True)}}, mode='sum')"
    )
