"""FiLM of RT-1."""

from torch import Tensor

import condmod
from condmod.functional import ScaleShift, blank_linear, featurewise_affine, reset_constant


class Rt1FilmConfig(condmod.ModulatorConfig):
    """Options of `rt1_film`."""


class Rt1Film(condmod.Modulator[Rt1FilmConfig, ScaleShift]):
    """RT-1's FiLM: y = (1 + s)·x + t, with (s, t) = W·c + b.

    Rows of W are [scale, shift]; in the source they are two layers. The condition is not
    activated.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        Weight and bias 0, so y = x.

    Source:
        Brohan et al., RT-1: Robotics Transformer for Real-World Control at Scale, 2022,
        arXiv:2212.06817, google-research/robotics_transformer
        film_efficientnet/film_conditioning_layer.py (Apache-2.0).
    """

    name = "rt1_film"
    Config = Rt1FilmConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: Rt1FilmConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.proj = blank_linear(self.condition_dim, 2 * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter as at the start; nothing is random."""
        reset_constant(self.proj, (0, 0))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> ScaleShift:
        """The projection's output as scale and shift."""
        return ScaleShift(*projected.chunk(2, dim=-1))

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """(1 + s)·x + t."""
        return featurewise_affine(x, modulation, self.site.channel_dim, where=self.where)
