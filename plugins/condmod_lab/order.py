"""What every step of a run sees, worked out from the seed and the step alone.

Nothing is carried from step to step: a resumed run, a run on more processes and a run in more
parts meet the same images in the same order, with the same noise, times and withheld labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_EPOCH: Final = 0
_STEP: Final = 1
_LAYERS: Final = 2
_HELD_OUT: Final = 3


@dataclass(frozen=True, slots=True)
class Draws:
    """What one optimiser step sees, or a part of it.

    Attributes:
        places: (B,), which images.
        noise: (B, C, H, W), standard normal: where their paths begin.
        t: (B,), from 0 to 1: how far along.
        present: (B,), False where the label is withheld.
    """

    places: Int[Tensor, " B"]
    noise: Float[Tensor, "B C H W"]
    t: Float[Tensor, " B"]
    present: Bool[Tensor, " B"]

    def part(self, place: int, parts: int) -> Draws:
        """One of `parts` equal parts."""
        size = len(self.places) // parts
        chosen = slice(place * size, (place + 1) * size)
        return Draws(self.places[chosen], self.noise[chosen], self.t[chosen], self.present[chosen])


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a run's draws: whole batches of a new permutation in every epoch.

    Args:
        seed: decides all of it.
        count: number of images, at least a batch.
        batch: images in a step.
        shape: (C, H, W) of an image.
        label_drop: probability that a label is withheld.
    """

    seed: int
    count: int
    batch: int
    shape: tuple[int, int, int]
    label_drop: float

    def at(self, step: int) -> Draws:
        """The draws of a step, counted from 0."""
        epoch, place = divmod(step, self.count // self.batch)
        permuted = torch.randperm(self.count, generator=_generator(self.seed, _EPOCH, epoch))
        generator = _generator(self.seed, _STEP, step)
        return Draws(
            permuted[place * self.batch : (place + 1) * self.batch],
            torch.randn(self.batch, *self.shape, generator=generator),
            torch.rand(self.batch, generator=generator),
            torch.rand(self.batch, generator=generator) >= self.label_drop,
        )

    def seed_layers(self, step: int, process: int) -> None:
        """Seed what layers draw for themselves in a step (dropout, an encoder's own drop)."""
        torch.manual_seed(_entropy(self.seed, _LAYERS, step, process))


def held_out_draws(seed: int, count: int, shape: tuple[int, int, int], times: int) -> list[Draws]:
    """Draws for `count` held-out images, at one time in each of `times` equal spans from 0 to 1."""
    generator = _generator(seed, _HELD_OUT)
    return [
        Draws(
            torch.arange(count),
            torch.randn(count, *shape, generator=generator),
            (span + torch.rand(count, generator=generator)) / times,
            torch.ones(count, dtype=torch.bool),
        )
        for span in range(times)
    ]


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(_entropy(*key))


def _entropy(*key: int) -> int:
    """64 bits that keys close to each other do not share."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
