"""A convolutional body: residual blocks of two convolutions, channels first."""

from collections.abc import Mapping
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from condmod import Condition, Modulator, ModulatorSpec, Site, SublayerModulator
from condmod_lab.places import AnyModulator, Place, check_parts, fill, generate
from condmod_lab.sections import ConvConfig


class ConvBlock(nn.Module):
    """Residual block of two convolutions, conditioned by a modulator between them.

    A modulator of features stands after the second norm, x + conv(SiLU(mod(norm(conv(SiLU(
    norm(x))))), c)). A modulator around sublayers brings its own norm and residual: with one part
    it wraps both convolutions, with two parts one each.

    Args:
        modulator: what `forward` will be given.
        channels: of the features.
        groups: of each GroupNorm.
    """

    def __init__(self, modulator: AnyModulator, channels: int, groups: int) -> None:
        super().__init__()
        self.activation = nn.SiLU()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        entry = isinstance(modulator, Modulator)
        between = entry or modulator.parts == 1
        self.norm1 = nn.GroupNorm(groups, channels) if entry else nn.Identity()
        self.norm2 = nn.GroupNorm(groups, channels) if between else nn.Identity()

    def forward(self, x: Float[Tensor, "B C H W"], place: Place) -> Float[Tensor, "B C H W"]:
        """Features to features of the same shape, by a modulator and its modulation."""
        match place:
            case Modulator() as modulator, modulation:
                h = modulator.modulate(self.norm2(self._first(x)), modulation)
                out = x + self._second(h)
            case SublayerModulator(parts=1) as modulator, modulation:
                out = modulator.around(
                    x, modulation, lambda h: self._second(self.norm2(self._first(h)))
                )
            case modulator, modulation:
                out = modulator.around(x, modulation, self._first, self._second)
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
        names = [f"blocks.{index}.modulator" for index in range(section.blocks)]
        self.bank = fill(spec, Site(channels, section.condition_dim, 1), names)
        check_parts(self.bank, "two convolutions")
        self.blocks = nn.ModuleList(
            ConvBlock(self.bank[name], channels, section.groups) for name in names
        )
        self.exit = nn.Conv2d(channels, image_channels, 3, padding=1)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        condition: Condition,
        made: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Images (B, C, H, W) and what the places take, or have made, to images of that shape."""
        h = self.entry(x)
        places = generate(self.bank, h, condition, made)
        for block, place in zip(self.blocks, places, strict=True):
            h = block(h, place)
        return cast(Tensor, self.exit(h))
