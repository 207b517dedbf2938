"""How a picture of a digit leans and how heavy its strokes are, measured by its moments."""

from __future__ import annotations

import torch
from captions import Look
from jaxtyping import Float, Int
from torch import Tensor

from condmod_lab.data import Images


def measure(images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 2"]:
    """Slant and weight of pictures (B, 1, H, W) from -1, paper, to 1, ink.

    The slant is -Σ ink·dx·dy / Σ ink·dy², the shear of the ink about its centre with y downwards:
    positive where the top leans right. The weight is the mean ink.
    """
    ink = (images[:, 0] + 1) / 2
    total = ink.sum((1, 2))
    y = torch.arange(ink.shape[1]).view(1, -1, 1)
    x = torch.arange(ink.shape[2]).view(1, 1, -1)
    dy = y - ((ink * y).sum((1, 2)) / total).view(-1, 1, 1)
    dx = x - ((ink * x).sum((1, 2)) / total).view(-1, 1, 1)
    slant = -(ink * dx * dy).sum((1, 2)) / (ink * dy * dy).sum((1, 2))
    return torch.stack((slant, ink.mean((1, 2))), dim=1)


class Thirds:
    """Which third of its digit a picture belongs to, by its slant and by its weight.

    A seven leans right and a six leans left by their shape: "slanted" is said of the third of the
    training pictures of a digit that lean right the most among their kind.

    Args:
        real: the training pictures.
    """

    def __init__(self, real: Images) -> None:
        thirds = torch.tensor([1 / 3, 2 / 3])
        self.limits = torch.stack(
            [
                measure(real.of_class(digit)).quantile(thirds, dim=0)
                for digit in range(int(real.labels.max()) + 1)
            ]
        )  # (10, 2 limits, slant and weight)

    def of(self, pictures: Images) -> Int[Tensor, "B 2"]:
        """Slant and weight of pictures, each 0, 1 or 2, among those of the digits they are of."""
        return (measure(pictures.images)[:, None] > self.limits[pictures.labels]).sum(1)

    def looks(self, pictures: Images) -> list[Look]:
        """What a caption may say of each picture."""
        labels = pictures.labels.tolist()
        return [Look(*row) for row in zip(labels, *self.of(pictures).T.tolist(), strict=True)]
