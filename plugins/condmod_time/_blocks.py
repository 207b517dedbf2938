"""What mechanisms share that modulate block by block, by what an LSTM makes of the blocks."""

from typing import Annotated, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import (
    Scale,
    ScaleShift,
    featurewise_affine,
    featurewise_scale,
    in_layout_of,
    unhalved,
    widened,
)
from condmod_time._lstm import Lstm, State

Block = Annotated[int, Field(ge=1, le=65536)]


class Controls(NamedTuple):
    """What an LSTM reads beside the features, (B, D)."""

    controls: Tensor


class Placed(Protocol):
    """A modulator at its site."""

    site: condmod.Site

    def where(self) -> str:
        """What errors call it."""

    def check_channels(self, x: Tensor) -> None:
        """Check the features' channels."""


class Following(Placed, Protocol):
    """A modulator that follows the blocks of its features."""

    lstm: Lstm

    @property
    def config(self) -> Any:
        """Its options, `block` among them."""

    def follow(
        self, pooled: Tensor, modulation: Any, state: State
    ) -> tuple[Scale | ScaleShift, State]:
        """The parts of each block, leaves (B, n, C), and the state behind the last.

        Args:
            pooled: (B, n, C), the largest value of each channel in each block.
            modulation: what `generate` made.
            state: that in front of the first block.
        """


def modulate_blocks(self: Following, x: Tensor, modulation: Any) -> Tensor:
    """Modulate each block of the features; nothing was before the first."""
    y, _ = _followed(self, x, modulation, None)
    return y


def step_blocks(
    self: Following, x: Tensor, modulation: Any, state: State | None = None
) -> tuple[Tensor, State]:
    """The same of the next features of a stream, with the state for the next step.

    The features are whole blocks; the state is what the step before gave, None at the beginning.

    Raises:
        ShapeError: a block is not whole, or the state is another's.
    """
    check_time(self, x)
    length, size = x.shape[time_dim(self.site)], self.config.block
    if length % size:
        raise condmod.ShapeError(
            f"{self.where()} steps by whole blocks of {size} positions; got features "
            f"{tuple(x.shape)}: hold the rest back for the next step, and at the end fill it up "
            "with zeros and cut what comes out"
        )
    return _followed(self, x, modulation, state)


def joined(self: Following, pooled: Tensor, controls: Tensor) -> Tensor:
    """What an LSTM reads of each block: the features, and behind them the controls.

    Raises:
        ShapeError: the controls are those of another batch.
    """
    if controls.shape != (pooled.shape[0], self.site.condition_dim):
        raise condmod.ShapeError(
            f"modulation {tuple(controls.shape)} does not fit features of a batch of "
            f"{pooled.shape[0]} in {self.where()}; its controls are (B, "
            f"condition_dim={self.site.condition_dim})"
        )
    held = controls.to(pooled.dtype)[:, None].expand(-1, pooled.shape[1], -1)
    return torch.cat([pooled, held], -1)


def time_dim(site: condmod.Site) -> int:
    """The dim of positions."""
    return 1 if site.channel_dim == -1 else 2


def check_time(self: Placed, x: Tensor) -> None:
    """Check that features run along one axis of positions.

    Raises:
        ShapeError: they have another rank, no position, or other channels.
    """
    if x.ndim != 3 or not x.shape[time_dim(self.site)]:
        channels = f"features={self.site.features}"
        shape = f"T, {channels}" if self.site.channel_dim == -1 else f"{channels}, T"
        raise condmod.ShapeError(
            f"{self.where()} runs along one axis of one position or more, features (B, {shape}); "
            f"got {tuple(x.shape)}"
        )
    self.check_channels(x)


def blocked(x: Tensor, time: int, size: int, fill: float = 0.0) -> Tensor:
    """(B, T, C) as (B, n, size, C), or (B, C, T) as (B, C, n, size), the last block filled up."""
    rest = -x.shape[time] % size
    if torch.compiler.is_compiling() or rest:  # one graph serves every length
        x = F.pad(x, (0, rest) if time == 2 else (0, 0, 0, rest), value=fill)
    return torch.unflatten(x, time, (-1, size))


def each_block(self: Placed, x: Tensor, blocks: Tensor, parts: Scale | ScaleShift) -> Tensor:
    """Features with each of their blocks modulated by its own parts, (B, n, C)."""
    dim, time = self.site.channel_dim, time_dim(self.site)
    wide = torch.promote_types(blocks.dtype, torch.float32)

    def spread(part: Any) -> Tensor:
        """A view of the shape of the blocks, laid out as they are, so that the result is too."""
        laid = part.to(wide).movedim(-1, dim).contiguous()
        return laid.unsqueeze(time + 1).expand(blocks.shape).movedim(dim, -1)  # type: ignore[no-any-return]

    scale = spread(parts.scale)
    if isinstance(parts, Scale):
        y = featurewise_scale(blocks, scale, dim, form="raw", where=self.where)
    else:
        affine = (scale, spread(parts.shift))
        y = featurewise_affine(blocks, affine, dim, form="raw", where=self.where)
    y = y.flatten(time, time + 1)
    if torch.compiler.is_compiling() or y.shape[time] > x.shape[time]:
        y = y.narrow(time, 0, x.shape[time]).clone(memory_format=torch.contiguous_format)
    return in_layout_of(x, y)


def _followed(
    self: Following, x: Tensor, modulation: Any, state: State | None
) -> tuple[Tensor, State]:
    check_time(self, x)
    blocks = blocked(x, time_dim(self.site), self.config.block)
    highest = blocks.amax(time_dim(self.site) + 1).movedim(self.site.channel_dim, -1)
    pooled = widened(highest, None, self.where)
    started = begun(self.lstm, pooled, state, x, self.where)
    with unhalved(x):
        parts, behind = self.follow(pooled, modulation, started)
    return each_block(self, x, blocks, parts), behind


def begun(lstm: Lstm, pooled: Tensor, state: State | None, x: Tensor, where: Any) -> State:
    """The state to begin with, zeros where there was nothing before.

    Raises:
        ShapeError: it is that of another batch or of another LSTM.
    """
    shape = (pooled.shape[0], lstm.hidden)
    if state is None:
        return State(pooled.new_zeros(shape), pooled.new_zeros(shape))
    shapes = [tuple(part.shape) for part in state]
    if shapes != [shape, shape]:
        raise condmod.ShapeError(
            f"{where()} goes on from the state that its step before gave, hidden and cell {shape} "
            f"for features {tuple(x.shape)}; got {' and '.join(map(str, shapes))}; begin a new "
            "stream with None"
        )
    return State(*(part.to(pooled.dtype) for part in state))
