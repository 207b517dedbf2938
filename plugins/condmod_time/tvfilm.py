"""Time-varying FiLM: one controller along time for all layers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import condmod
from condmod.functional import ScaleShift, blank_linear, reset_constant, unhalved
from condmod_time._blocks import Block, begun, blocked, check_time, each_block, time_dim
from condmod_time._lstm import Lstm, State


class ByBlock(NamedTuple):
    """An affine modulation of every block: leaves (B, n, C)."""

    scale: Tensor
    shift: Tensor


class TVFilmConfig(condmod.ModulatorConfig):
    """Options of `tvfilm`."""

    block: Block = 128
    """How many positions share one γ and β."""
    width: condmod.Width = 32
    """Channels that the controller gives to every layer."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default as published, or y = x at the start."""


class Controller(nn.Module):
    """An LSTM along the blocks of a condition, which a bank runs once for all its sites."""

    def __init__(self, condition_dim: int, width: int, block: int) -> None:
        super().__init__()
        self.block = block
        self.lstm = Lstm(condition_dim, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.lstm.reset_parameters()

    def forward(self, condition: Tensor) -> Tensor:
        """(B, T, D) to (B, n, width), n blocks; nothing was before the first."""
        return self._followed(condition, None)[0]

    def step(self, condition: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The same of the next chunk of a stream, of whole blocks, with the state for the next.

        Raises:
            ShapeError: a block is not whole, or the state is another's.
        """
        if condition.ndim != 3 or condition.shape[1] % self.block:
            raise condmod.ShapeError(
                f"tvfilm's controller steps by whole blocks of {self.block} positions of a "
                f"condition (B, T, {self.lstm.weight_ih_l0.shape[1]}); got "
                f"{tuple(condition.shape)}: hold the rest back for the next step"
            )
        return self._followed(condition, state)

    def _followed(self, condition: Tensor, state: State | None) -> tuple[Tensor, State]:
        if condition.ndim != 3 or not condition.shape[1]:
            raise condmod.ShapeError(
                "tvfilm's controller runs along one axis of one position or more, a condition "
                f"(B, T, {self.lstm.weight_ih_l0.shape[1]}); got {tuple(condition.shape)}"
            )
        pooled = blocked(condition, 1, self.block, fill=-torch.inf).amax(2)
        pooled = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
        first = begun(self.lstm, pooled, state, condition, lambda: "tvfilm's controller")
        with unhalved(pooled):
            sequence, state = self.lstm(pooled, first)
        return sequence.to(condition.dtype), state


class TVFilm(condmod.Modulator[TVFilmConfig, ByBlock]):
    """TVFiLM: y = γ_k·x + β_k in block k, with [γ, β]_k = W·LSTM(max of c over block k) + b.

    The LSTM is one for all sites of a bank; each site has its own W and b, rows [γ, β]. γ is raw.
    The LSTM runs in float32 for half precision. Published, c is the magnitude of the network's
    input and the effect's controls, the same at every position.

    Shapes:
        x (B, T, C) or (B, C, T); condition aligned to x, (B, T, D) or (B, D, T). Leaves of the
        modulation are (B, n, C), a vector per block. Features that are shorter than the
        condition, as behind convolutions without padding, take its last blocks.

    Init:
        published: torch's defaults. identity: W 0, γ = 1, β = 0.

    Source:
        Comunità, Steinmetz and Reiss, NablAFx: A Framework for Differentiable Black-box and
        Gray-box Modeling of Audio Effects, 2025, arXiv:2502.11668, mcomunita/nablafx
        nablafx/modules.py: TVFiLMCond and TVFiLMMod (MIT).
    """

    name = "tvfilm"
    Config = TVFilmConfig
    kinds = frozenset({"aligned"})

    def __init__(self, config: TVFilmConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.proj = blank_linear(config.width, 2 * site.features)
        self.reset_parameters()

    @classmethod
    def shared(cls, config: TVFilmConfig, sites: Sequence[condmod.Site]) -> nn.Module:
        """The controller; sites may differ in their features."""
        condition_dim, _ = condmod.one_size(cls.name, [replace(site, features=1) for site in sites])
        return Controller(condition_dim, config.width, config.block)

    def reset_parameters(self) -> None:
        """Draw W and b afresh; the controller draws its own."""
        self.proj.reset_parameters()
        if self.config.init == "identity":
            reset_constant(self.proj, (1, 0))

    def generate(self, condition: Any) -> ByBlock:
        """γ and β of each block, (B, n, C)."""
        return ByBlock(*self.proj(self.received(condition)).chunk(2, -1))

    def modulate(self, x: Tensor, modulation: ByBlock) -> Tensor:
        """γ·x + β, the last blocks of the modulation."""
        check_time(self, x)
        blocks = blocked(x, time_dim(self.site), self.config.block)
        number = blocks.shape[time_dim(self.site)]
        scale, shift = modulation
        shape = tuple(scale.shape)
        if len(shape) != 3 or shape[::2] != (x.shape[0], self.site.features) or shape[1] < number:
            raise condmod.ShapeError(
                f"modulation {shape} does not fit features {tuple(x.shape)} in {self.where()}; it "
                f"has a vector of C for each block of {self.config.block} positions, {number} or "
                "more"
            )
        return each_block(self, x, blocks, ScaleShift(scale[:, -number:], shift[:, -number:]))
