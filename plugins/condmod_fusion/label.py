"""A learned vector for each class."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

import condmod


class LabelConfig(condmod.NullableConfig):
    """Options of `label`."""

    classes: Annotated[int, Field(ge=1, le=10_000_000)]
    """N, the number of classes; a label is an integer from 0 to N - 1."""
    dim: condmod.Width = 256
    """Width of what comes out, where nothing else sets it."""
    std: Annotated[float, Field(gt=0.0, le=100.0)] = 0.02
    """Standard deviation of the vectors at the start: 0.02 in DiT, 1 in ADM."""


class Label(condmod.Encoder[LabelConfig]):
    """Embedding: e = table[y], one learned row per class.

    With `nullable` the learned null is DiT's extra row: an absent label, whatever its value,
    gives the null.

    Shapes:
        y (B,) -> (B, D), or (B, T) with a mask (B, T) if need be -> (B, T, D); integer.

    Init:
        published: N(0, 0.02²), the null alike (DiT).

    Source:
        Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, arXiv:2212.09748.
    """

    name = "label"
    Config = LabelConfig

    def __init__(self, config: LabelConfig, out_dim: int | None) -> None:
        super().__init__(config, out_dim or config.dim)
        self.table = nn.Parameter(torch.empty(config.classes, self.out_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        nn.init.normal_(self.table, std=self.config.std)
        self.reset_null(self.config.std)

    def encode(self, signal: condmod.Signal) -> Tensor:
        """Labels (B,) or (B, T) to (B, D) or (B, T, D)."""
        shapes = {1: "one label per sample, (B,),", 2: "per position, (B, T)"}
        label = self.read(signal, shapes)
        if label.dtype == torch.bool or label.is_floating_point() or label.is_complex():
            raise condmod.ConditionError(
                f"label takes integers; got {label.dtype}; continuous values go through scalar"
            )
        try:
            return nn.functional.embedding(label.long(), self.table)
        except IndexError:
            raise condmod.ConditionError(self._out_of_range(label)) from None

    def _out_of_range(self, label: Tensor) -> str:
        low, high = (int(bound) for bound in label.aminmax())
        mend = "; an absent label is Signal(label, present=...) for label(nullable=True)"
        return (
            f"label has the classes 0 to {self.config.classes - 1}; got {low} to {high}"
            f"{mend if low < 0 else ''}"
        )
