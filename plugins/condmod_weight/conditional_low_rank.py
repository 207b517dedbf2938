"""A low-rank path beside a layer, its ranks weighted by the condition."""

import torch
from torch import Tensor, nn

import condmod
from condmod.functional import Scale, blank_linear, featurewise_scale
from condmod_weight._beside import Alpha, Rank, beside, enter_as_it_is, width


class ConditionalLowRankConfig(condmod.ModulatorConfig):
    """Options of `conditional_low_rank`."""

    rank: Rank = 8
    """r, the width of the path."""
    alpha: Alpha = 8.0
    """The path is scaled by alpha/rank, as in LoRA."""


class ConditionalLowRank(condmod.SublayerModulator[ConditionalLowRankConfig, Scale]):
    """Conditional LoRA: f(x) + alpha/r · U·(g(c)⊙(V·x)), beside a sublayer f.

    V and U are learned matrices of rank r, and g(c), one Linear of the condition, weights the
    ranks: for each condition another update of f's weight, for U·diag(g(c))·V is one.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x. f acts at
        each position, as a Linear or a convolution with kernel 1; it may change C.

    Init:
        U = 0, so it starts as f, and there is no option. V and the weight of g have torch's Linear
        default, the bias of g is 1, so that the ranks start around the weight of LoRA.

    Source:
        Choi et al., Simple Drop-in LoRA Conditioning on Attention Layers Will Improve Your
        Diffusion Model, 2024, arXiv:2405.03958; there each weight is shared by several ranks, and
        comes from an MLP.
    """

    name = "conditional_low_rank"
    Config = ConditionalLowRankConfig
    kinds = frozenset({"global", "aligned", "rows"})
    site_params = True
    changes_width = True
    generate = condmod.generate_linear
    enter = enter_as_it_is

    def __init__(self, config: ConditionalLowRankConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.proj = blank_linear(self.condition_dim, config.rank)
        self.down = blank_linear(site.features, config.rank, bias=False)
        self.up = blank_linear(config.rank, width(site), bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.proj.reset_parameters()
        nn.init.ones_(self.proj.bias)
        self.down.reset_parameters()
        nn.init.zeros_(self.up.weight)

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> tuple[Scale]:
        """The projection's output as the weights of the ranks."""
        return (Scale(projected),)

    def exit(
        self,
        x: Tensor,
        y: Tensor,
        modulation: Scale,
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """The sublayer's output and the path."""
        dim = self.site.channel_dim
        h = _pointwise(self.down, x, dim)
        h = featurewise_scale(h, modulation.scale, dim, form="raw", where=self.where)
        config = self.config
        return beside(self, x, y, _pointwise(self.up, h, dim), config.alpha / config.rank)


def _pointwise(layer: nn.Linear, x: Tensor, channel_dim: int) -> Tensor:
    """A Linear's weight over the channels of each position, wherever they lie, and no copy of x."""
    weight = layer.weight.to(x.dtype)  # which may be wider than a frozen model
    if channel_dim == -1 or x.ndim == 2:
        return torch.nn.functional.linear(x, weight)
    y = torch.matmul(weight, x.flatten(2))
    return y.reshape(*y.shape[:2], *x.shape[2:])
