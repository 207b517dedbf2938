"""The training config: validated from YAML, with overrides from the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from condmod import EncoderSpec, ModulatorSpec, yaml_text
from condmod_lab.errors import ConfigError

DEFAULT_ENCODER: Final = (
    "fuse(inputs={'time': timestep(dim=64, scale=1000.0, hidden=[64]), "
    "'label': label(classes=10, std=1.0, nullable=True, drop=0.1)}, mode='sum')"
)
_SPEC_FIELDS: Final = ("modulator", "encoder")


class Section(BaseModel):
    """Base of every part of a config: strict, frozen, no unknown fields."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class BackboneConfig(Section):
    """Widths and depth of the convolutional network."""

    channels: Annotated[int, Field(ge=1, le=1024)] = 32
    """Channels of every block."""
    blocks: Annotated[int, Field(ge=1, le=64)] = 4
    """Number of residual blocks; each holds one modulator."""
    groups: Annotated[int, Field(ge=1, le=1024)] = 8
    """Groups of every GroupNorm; they divide the channels."""
    condition_dim: Annotated[int, Field(ge=1, le=4096)] = 64
    """Width of the condition that the encoder gives to every modulator."""

    @model_validator(mode="after")
    def _groups_divide_channels(self) -> Self:
        if self.channels % self.groups:
            raise ValueError(f"groups ({self.groups}) must divide channels ({self.channels})")
        return self


class TrainingConfig(Section):
    """The optimisation."""

    steps: Annotated[int, Field(ge=1, le=10_000_000)] = 1500
    """Number of optimiser steps."""
    batch: Annotated[int, Field(ge=1, le=1024)] = 128
    """Images in one step, over all processes."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-3
    """Peak of the one-cycle schedule."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """AdamW's decay."""
    clip: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Largest norm of the gradient."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay of the averaged weights that samples are drawn with; it warms up from 0.1."""
    log_every: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    """Steps between two lines of metrics.jsonl; each is the mean over these steps."""
    checkpoint_every: Annotated[int, Field(ge=1, le=1_000_000)] = 250
    """Steps between two checkpoints."""


class SamplingConfig(Section):
    """How samples are drawn, for the metrics and the pictures."""

    samples: Annotated[int, Field(ge=20, le=100_000)] = 1000
    """Number of samples that the metrics are measured on, the classes in turn."""
    steps: Annotated[int, Field(ge=1, le=10_000)] = 25
    """Euler steps from noise to image."""
    guidance: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Classifier-free guidance; 1 is the plain conditional flow."""


class TrainConfig(Section):
    """A whole run: what conditions the network, how it learns, where the results go."""

    modulator: ModulatorSpec = "dense_film"
    """The modulator of every block."""
    encoder: EncoderSpec = DEFAULT_ENCODER
    """The encoder of {'time': ..., 'label': ...}, the condition of every modulator."""
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Decides every random draw of a run."""
    output: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")] = "runs/digits"
    """The run folder."""
    backbone: BackboneConfig = BackboneConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()

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


def _override(document: dict[str, Any], override: str) -> None:
    """Set one dotted key of nested mappings, copying each mapping on the way."""
    key, equals, text = override.partition("=")
    known = list(_keys(TrainConfig))
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
        document[parent] = document = dict(section) if isinstance(section, Mapping) else {}
    is_spec_text = key in _SPEC_FIELDS and not text.lstrip().startswith("{")
    document[leaf] = text if is_spec_text else yaml_text.parse(text, f"--set {override}")


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


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
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"  {place}: no such field{_nearest(place, _keys(TrainConfig))}"
    if error["loc"] and error["loc"][0] in _SPEC_FIELDS:  # condmod has said what is wrong
        return f"  {place}: {error['msg']}".replace("\n", "\n  ")
    if error["type"] == "value_error":
        return f"  {place}: {error['ctx']['error']}"
    rule = error["msg"].replace("Input should", "should", 1)
    return f"  {place}: {rule}; got {error['input']!r:.80}"
