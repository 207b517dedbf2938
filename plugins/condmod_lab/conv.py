"""A convolutional body: residual blocks of two convolutions, channels first."""

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from condmod import Condition, Modulator, ModulatorSpec, Site, SublayerModulator
from condmod_lab.places import AnyModulator, check_parts, fill
from condmod_lab.sections import ConvConfig


class ConvBlock(nn.Module):
    """Residual block of two convolutions, conditioned by a modulator between them.

    A modulator of features stands after the second norm, x + conv(SiLU(mod(norm(conv(SiLU(
    norm(x))))), c)). A modulator around sublayers brings its own norm and residual: with one part
    it wraps both convolutions, with two parts one each.
    """

    def __init__(self, modulator: AnyModulator, channels: int, groups: int) -> None:
        super().__init__()
        check_parts(modulator, "two convolutions")
        self.modulator = modulator
        self.activation = nn.SiLU()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        entry = isinstance(modulator, Modulator)
        between = entry or modulator.parts == 1
        self.norm1 = nn.GroupNorm(groups, channels) if entry else nn.Identity()
        self.norm2 = nn.GroupNorm(groups, channels) if between else nn.Identity()

    def forward(
        self, x: Float[Tensor, "B C H W"], condition: Condition
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


class ConvBody(nn.Module):
    """Images to images through residual blocks; each block is a place for a modulator.

    Args:
        spec: what fills every place.
        section: width and depth.
        image_channels: of the images, 1 or 3.

    Raises:
        SiteError: the modulator does not fit a block; says which and why.
    """

    def __init__(self, spec: ModulatorSpec, section: ConvConfig, image_channels: int) -> None:
        super().__init__()
        channels = section.channels
        self.entry = nn.Conv2d(image_channels, channels, 3, padding=1)
        sites = (
            Site(channels, section.condition_dim, 1, name=f"blocks.{index}.modulator")
            for index in range(section.blocks)
        )
        self.blocks = nn.ModuleList(
            ConvBlock(fill(spec, site), channels, section.groups) for site in sites
        )
        self.exit = nn.Conv2d(channels, image_channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "B C H W"], condition: Condition
    ) -> Float[Tensor, "B C H W"]:
        """Images (B, C, H, W) and what the places take to images of the same shape."""
        h = self.entry(x)
        for block in self.blocks:
            h = block(h, condition)
        return cast(Tensor, self.exit(h))
