"""A learned scale and shift for each step of a schedule."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import ScaleShift, featurewise_affine, fill


class TimestepTableConfig(condmod.ModulatorConfig):
    """Options of `timestep_table`."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """N, the number of steps; a time is an integer from 0 to N - 1."""
    init: Literal["published", "identity"] = "published"
    """What Embedding, SiLU and Linear give at torch's defaults, or y = x at the start."""


class TimestepTable(condmod.Modulator[TimestepTableConfig, ScaleShift]):
    """One learned row per step: y = (1 + s_t)·x + b_t, with (s_t, b_t) = table[t].

    The table (N, 2C), rows [scale, shift], is what Embedding(N, C), SiLU and Linear(C, 2C) give
    for each step, computed once: every such pair of layers is a table, and reads as one Embedding.

    Shapes:
        x (B, ..., C) or (B, C, ...) with integer t (B,); x (B, T, C) or (B, C, T) with t (B, T).

    Init:
        published: the table that Embedding and Linear give as torch draws them, as in diffusers'
        AdaLayerNorm; under equal seeds, the very same. identity: 0.

    Source:
        AdaLayerNorm of microsoft/VQ-Diffusion (Gu et al., 2021, arXiv:2111.14822, MIT), kept in
        diffusers (Apache-2.0); here without its norm.
    """

    name = "timestep_table"
    Config = TimestepTableConfig
    kinds = frozenset({"raw"})

    def __init__(self, config: TimestepTableConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.table = nn.Parameter(torch.empty(config.steps, 2 * site.features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        if self.config.init == "identity":
            nn.init.zeros_(self.table)
            return
        features = self.site.features
        like: dict[str, Any] = {"device": self.table.device, "dtype": self.table.dtype}
        embedding = nn.Embedding(self.config.steps, features, **like)
        linear = nn.Linear(features, 2 * features, **like)
        fill(self.table, linear(nn.functional.silu(embedding.weight)).detach())

    def generate(self, condition: condmod.Condition) -> ScaleShift:
        """Scale and shift, each (B, C) or (B, T, C)."""
        steps = self._steps(condition)
        try:
            rows = nn.functional.embedding(steps, self.table)
        except IndexError:
            low, high = (int(bound) for bound in steps.aminmax())
            raise condmod.ConditionError(
                f"{self.where()} has the steps 0 to {self.config.steps - 1}; got {low} to {high}"
            ) from None
        return ScaleShift(*rows.chunk(2, dim=-1))

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """(1 + s)·x + b."""
        return featurewise_affine(x, modulation, self.site.channel_dim, where=self.where)

    def _steps(self, condition: condmod.Condition) -> Tensor:
        """The condition as rows of the table."""
        signal = condition if isinstance(condition, condmod.Signal) else condmod.Signal(condition)
        time = signal.value
        if not isinstance(time, Tensor) or not (signal.present is None is signal.index):
            raise condmod.ConditionError(
                f"{self.where()} takes one tensor of steps, without presence or index; "
                f"got {type(condition).__name__}"
            )
        if time.dtype == torch.bool or time.is_floating_point() or time.is_complex():
            raise condmod.ConditionError(
                f"{self.where()} has one row per integer step; got {time.dtype}; "
                "a continuous time goes through per_timestep"
            )
        if time.ndim not in {1, 2}:
            raise condmod.ShapeError(
                f"{self.where()} takes one step per sample, (B,), or per position, (B, T); "
                f"got {tuple(time.shape)}"
            )
        return time.long()
