"""A low-rank update of a layer's weight that a network generates for each sample."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import condmod
from condmod.functional import Activation, blank_linear, fill, mlp, reset_linears
from condmod_weight._beside import Alpha, Rank, beside, enter_as_it_is, width


class HypernetworkConfig(condmod.ModulatorConfig):
    """Options of `hypernetwork`."""

    rank: Rank = 8
    """r, the rank of each sample's update."""
    alpha: Alpha = 8.0
    """The update is scaled by alpha/rank, as in LoRA."""
    hidden: tuple[condmod.Width, ...] = ()
    """Widths of hidden layers of the generator, each a Linear and the activation."""
    activation: Activation = "silu"
    """Activation behind each hidden layer."""


class Update(NamedTuple):
    """Each sample's factors: down (B, r, C) and up (B, r, O), channels last."""

    down: Tensor
    up: Tensor


class Hypernetwork(condmod.SublayerModulator[HypernetworkConfig, Update]):
    """Hypernetwork: f(x) + alpha/r · B(c)·A(c)·x, with A and B generated for each sample.

    A (r, C) and B (O, r) come from one Linear of an MLP of the condition, rows [A, B], and are
    applied one after the other, so no sample has a weight of O times C.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D). f acts at each position,
        as a Linear or a convolution with kernel 1; it may turn C features into O.

    Init:
        The last Linear has the weight 0, and a bias that is LoRA's start: A as torch draws a
        Linear, B = 0. So it starts as f, and there is no option.

    Source:
        Charakorn et al., Text-to-LoRA: Instant Transformer Adaption, 2025, arXiv:2506.06105, the
        head for one layer; the start is that of Beck et al., Hypernetworks in Meta-Reinforcement
        Learning, 2022, arXiv:2210.11348.
    """

    name = "hypernetwork"
    Config = HypernetworkConfig
    kinds = frozenset({"global"})
    changes_width = True
    generate = condmod.generate_linear
    enter = enter_as_it_is

    def __init__(self, config: HypernetworkConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        widths = (self.condition_dim, *config.hidden)
        self.hidden = mlp(widths, config.activation)
        self.proj = blank_linear(widths[-1], config.rank * (site.features + width(site)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        reset_linears(self.hidden)
        nn.init.zeros_(self.proj.weight)
        rank, features = self.config.rank, self.site.features
        bias = self.proj.bias
        start = nn.Linear(features, rank, bias=False, device=bias.device, dtype=bias.dtype).weight
        fill(bias, torch.cat([start.flatten(), start.new_zeros(rank * width(self.site))]))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        prepared: Tensor = self.hidden(self.accept(condition))
        return prepared

    def unpack(self, projected: Tensor) -> tuple[Update]:
        """The projection's output as the factors A and B."""
        rank = self.config.rank
        cut = rank * self.site.features
        halves = projected[:, :cut], projected[:, cut:]
        return (Update(*(torch.unflatten(half, 1, (rank, -1)) for half in halves)),)

    def exit(
        self,
        x: Tensor,
        y: Tensor,
        modulation: Update,
        sublayer: condmod.Sublayer | None,  # noqa: ARG002
    ) -> Tensor:
        """The sublayer's output and the update's."""
        down, up = (factor.to(x.dtype) for factor in modulation)
        if x.shape[0] != down.shape[0]:
            raise condmod.ShapeError(
                f"{self.where()} generated updates for a batch of {down.shape[0]}; got features "
                f"{tuple(x.shape)}"
            )
        config, out = self.config, width(self.site)
        if self.site.channel_dim == 1:
            path = torch.bmm(up.mT, torch.bmm(down, x.flatten(2) if x.ndim > 2 else x[..., None]))
            path = path.reshape(x.shape[0], out, *x.shape[2:])
        else:
            path = torch.bmm(torch.bmm(x.flatten(1, -2) if x.ndim > 2 else x[:, None], down.mT), up)
            path = path.reshape(*x.shape[:-1], out)
        return beside(self, x, y, path, config.alpha / config.rank)
