"""A small convolutional network whose every conditioning place is filled from a spec."""

from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from condmod import (
    CondmodError,
    Modulator,
    Signal,
    SiteError,
    SublayerModulator,
    configure,
    create,
    create_encoder,
)
from condmod_lab.config import TrainConfig
from condmod_lab.data import CLASSES, SIDE

AnyModulator: TypeAlias = Modulator[Any, Any] | SublayerModulator[Any, Any]


class Block(nn.Module):
    """Residual block of two convolutions, conditioned by a modulator between them.

    A modulator of features stands after the second norm, x + conv(SiLU(mod(norm(conv(SiLU(
    norm(x))))), c)). A modulator around sublayers brings its own norm and residual: with one part
    it wraps both convolutions, with two parts one each.
    """

    def __init__(self, modulator: AnyModulator, channels: int, groups: int) -> None:
        super().__init__()
        self.modulator = modulator
        self.activation = nn.SiLU()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        entry = isinstance(modulator, Modulator)
        between = entry or modulator.parts == 1
        self.norm1 = nn.GroupNorm(groups, channels) if entry else nn.Identity()
        self.norm2 = nn.GroupNorm(groups, channels) if between else nn.Identity()

    def forward(
        self, x: Float[Tensor, "B C H W"], condition: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B C H W"]:
        """Features to features of the same shape."""
        match self.modulator:
            case Modulator() as modulator:
                out = x + self._second(modulator(self.norm2(self._first(x)), condition))
            case SublayerModulator(parts=1) as modulator:
                out = modulator(x, condition, lambda h: self._second(self.norm2(self._first(h))))
            case modulator:
                out = modulator(x, condition, self._first, self._second)
        return out

    def _first(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv1(self.activation(self.norm1(x))))

    def _second(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv2(self.activation(x)))


class DigitNet(nn.Module):
    """Velocity of the flow for 8x8 images, from time and class.

    The encoder turns {'time': t, 'label': class} into one condition (B, D), which a modulator in
    each block brings to the features.

    Args:
        config: widths, depth, and the specs of encoder and modulators.

    Raises:
        SiteError: the modulator does not fit a block; says which and why.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        width = config.backbone
        self.encoder = create_encoder(config.encoder, out_dim=width.condition_dim)
        self.entry = nn.Conv2d(1, width.channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            Block(_modulator(config, f"blocks.{place}.modulator"), width.channels, width.groups)
            for place in range(width.blocks)
        )
        self.exit = nn.Conv2d(width.channels, 1, 3, padding=1)

    def forward(
        self,
        x: Float[Tensor, "B 1 H W"],
        t: Float[Tensor, " B"],
        labels: Int[Tensor, " B"],
        present: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B 1 H W"]:
        """Velocity at x, of x's shape.

        Args:
            x: (B, 1, H, W), a point between noise (t = 0) and data (t = 1).
            t: (B,), from 0 to 1.
            labels: (B,), the class of each sample.
            present: (B,), False where a sample has no label, whatever `labels` says.
        """
        condition = self.encoder({"time": t, "label": Signal(labels, present=present)})
        h = self.entry(x)
        for block in self.blocks:
            h = block(h, condition)
        return cast(Tensor, self.exit(h))


def build(config: TrainConfig) -> DigitNet:
    """Build the network and try it on one batch, so that a misfit shows before training.

    Raises:
        CondmodError: an encoder or modulator does not fit; says which place and why.
    """
    net = DigitNet(config).eval()
    try:
        _try_out(net)
    except CondmodError as error:
        raise SiteError(
            f"{config.encoder} does not fit the digits: as the config's encoder it is given "
            f"{{'time': times (B,), 'label': classes (B,) from 0 to {CLASSES - 1}, some of them "
            f"absent}}: {error}"
        ) from None
    return net


def _try_out(net: DigitNet) -> None:
    place = torch.arange(2 * CLASSES)  # every class once with its label and once without
    with torch.no_grad():
        images = torch.zeros(len(place), 1, SIDE, SIDE)
        net(images, place / len(place), place % CLASSES, place < CLASSES)


def _modulator(config: TrainConfig, place: str) -> AnyModulator:
    spec, width = config.modulator, config.backbone
    kinds = configure(spec).component.kinds
    if "global" not in kinds:
        raise SiteError(
            f"the place {place!r} offers one embedding of time and class for a whole image (a "
            f"global condition); {spec} takes {' or '.join(sorted(kinds))} conditions; "
            "fill it with another modulator, such as dense_film"
        )
    modulator = create(
        spec,
        features=width.channels,
        condition_dim=width.condition_dim,
        channel_dim=1,
        name=place,
    )
    if isinstance(modulator, SublayerModulator) and modulator.parts not in (1, 2):
        raise SiteError(
            f"the place {place!r} has two convolutions, so it takes a modulator around 1 or 2 "
            f"sublayers; {spec} acts around {modulator.parts}"
        )
    return modulator
