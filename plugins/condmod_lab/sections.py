"""The sections of a training config: the data, the network, the optimisation, the sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


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


def _by_name(default: str) -> Callable[[Any], str]:
    """Which variant a value is, by its `name`; a mapping without one is the default's."""

    def variant(value: Any) -> str:
        if isinstance(value, Mapping):
            return str(value.get("name", default))
        return str(getattr(value, "name", default))

    return variant


Path = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
Column = Annotated[str, Field(min_length=1, max_length=200)]
Size = Annotated[int, Field(ge=4, le=256)]


class DigitsConfig(Section):
    """The 1,797 real handwritten digits of 8x8 pixels that scikit-learn ships."""

    name: Literal["digits"] = "digits"
    """Which data."""


class FolderConfig(Section):
    """Pictures of your own, in one folder per class: `path/<class>/<any name>.png`."""

    name: Literal["folder"]
    """Which data."""
    path: Path
    """The folder of the classes' folders."""
    size: Size = 16
    """Side in pixels; each picture is cropped to a centred square and resized."""
    color: bool = False
    """Three channels (RGB) or one (gray)."""
    skip_broken: bool = False
    """Leave out pictures that cannot be read, where they would stop the run."""


class CsvConfig(Section):
    """Pictures of your own, labelled by texts in a CSV file; each distinct text is a class."""

    name: Literal["csv"]
    """Which data."""
    path: Path
    """The CSV file, with a header; paths in it are relative to its folder."""
    image_column: Column = "file_name"
    """The column that names the picture."""
    text_column: Column = "text"
    """The column that holds its label."""
    size: Size = 16
    """Side in pixels; each picture is cropped to a centred square and resized."""
    color: bool = False
    """Three channels (RGB) or one (gray)."""
    skip_broken: bool = False
    """Leave out pictures that cannot be read, where they would stop the run."""


DataConfig = Annotated[
    Annotated[DigitsConfig, Tag("digits")]
    | Annotated[FolderConfig, Tag("folder")]
    | Annotated[CsvConfig, Tag("csv")],
    Discriminator(_by_name("digits")),
]


class ConvConfig(Section):
    """Residual blocks of two convolutions, channels first."""

    name: Literal["conv"] = "conv"
    """Which network."""
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


class TransformerConfig(Section):
    """Blocks of self-attention and feed-forward over patches, channels last."""

    name: Literal["transformer"]
    """Which network."""
    channels: Annotated[int, Field(ge=1, le=4096)] = 64
    """Width of every token."""
    blocks: Annotated[int, Field(ge=1, le=64)] = 3
    """Number of blocks; each has two sublayers, attention and feed-forward."""
    heads: Annotated[int, Field(ge=1, le=128)] = 4
    """Heads of the attention; they divide the channels."""
    patch: Annotated[int, Field(ge=1, le=64)] = 2
    """Side of a patch in pixels; it divides the pictures' side."""
    condition_dim: Annotated[int, Field(ge=1, le=4096)] = 64
    """Width of the condition that the encoder gives to every modulator."""

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> Self:
        if self.channels % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide channels ({self.channels})")
        return self


BackboneConfig = Annotated[
    Annotated[ConvConfig, Tag("conv")] | Annotated[TransformerConfig, Tag("transformer")],
    Discriminator(_by_name("conv")),
]


class TrainingConfig(Section):
    """The optimisation."""

    steps: Annotated[int, Field(ge=1, le=10_000_000)] = 1500
    """Number of optimiser steps."""
    batch: Annotated[int, Field(ge=1, le=65_536)] = 128
    """Images in one optimiser step, over all processes and accumulated parts."""
    accumulate: Annotated[int, Field(ge=1, le=1024)] = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the network computes in (autocast); weights and optimiser stay in fp32."""
    sharding: Literal["none", "fsdp2"] = "none"
    """What several processes hold: all of the weights each (DDP), or a part each (FSDP2); one
    process holds all of them."""
    label_drop: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of labels that are withheld, so that the network also learns the null condition."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-3
    """Peak of the one-cycle schedule."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """AdamW's decay."""
    clip: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Largest norm of the gradient."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay of the averaged weights that samples are drawn with; it warms up from 2/11."""
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
