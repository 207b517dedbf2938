"""Rectified flow: straight paths from noise to data, with classifier-free guidance.

With noise x0 ~ N(0, 1), data x1 and t in [0, 1], x_t = (1 - t)·x0 + t·x1, and the network learns
the velocity x1 - x0. Source: Liu et al. 2022, arXiv 2209.03003; guidance: Ho & Salimans 2022,
arXiv 2207.12598.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from condmod_lab.order import Draws

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""velocity(x (B, ...), t (B,), labels (B,), present (B,) bool) -> (B, ...)."""


def flow_errors(
    velocity: Velocity, x1: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"], draws: Draws
) -> Float[Tensor, " B"]:
    """Mean squared error of each sample's velocity at one point of its path, (B,).

    Args:
        velocity: the network.
        x1: (B, C, H, W), the data.
        labels: (B,), its classes.
        draws: noise, time and presence of each.
    """
    x0, t = draws.noise.to(x1), draws.t.to(x1)
    x = torch.lerp(x0, x1, t.view(-1, 1, 1, 1))
    predicted = velocity(x, t, labels, draws.present.to(labels.device))
    return F.mse_loss(predicted, x1 - x0, reduction="none").flatten(1).mean(1)


def guided(
    velocity: Velocity,
    x: Float[Tensor, "B C H W"],
    t: Float[Tensor, " B"],
    labels: Int[Tensor, " B"],
    present: Bool[Tensor, " B"],
    guidance: float,
) -> Float[Tensor, "B C H W"]:
    """v_null + guidance·(v_label - v_null); guidance 1 is the plain conditional velocity."""
    conditional = velocity(x, t, labels, present)
    if guidance == 1.0:
        return conditional
    null = velocity(x, t, labels, torch.zeros_like(present))
    return torch.lerp(null, conditional, guidance)


def times(steps: int, like: Tensor) -> Float[Tensor, " N"]:
    """The left ends of equal steps from t = 0 to t = 1, with the dtype and device of `like`."""
    ends = [step / steps for step in range(steps)]
    return torch.tensor(ends, dtype=like.dtype, device=like.device)


@torch.no_grad()
def draw(
    velocity: Velocity,
    noise: Float[Tensor, "B C H W"],
    labels: Int[Tensor, " B"],
    *,
    present: Bool[Tensor, " B"] | None = None,
    steps: int,
    guidance: float = 1.0,
) -> Float[Tensor, "B C H W"]:
    """Follow the flow from noise to samples by Euler steps.

    Args:
        velocity: the trained network, in eval mode.
        noise: (B, C, H, W), standard normal.
        labels: (B,), the class of each sample.
        present: (B,), which samples have a label at all; all of them by default.
        steps: number of equal steps from t = 0 to t = 1.
        guidance: how far to go beyond the null condition's velocity.

    Returns:
        (B, C, H, W), clamped to the data's range from -1 to 1.
    """
    if present is None:
        present = torch.ones_like(labels, dtype=torch.bool)
    x = noise
    for time in times(steps, x):
        t = time.expand(len(labels))
        x = x + guided(velocity, x, t, labels, present, guidance) / steps
    return x.clamp(-1, 1)
