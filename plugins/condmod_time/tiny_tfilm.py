"""TFiLM through a bottleneck."""

import torch.nn.functional as F
from torch import Tensor, nn

import condmod
from condmod.functional import Nothing, ScaleShift, blank_linear, mlp, reset_linears
from condmod_time._blocks import Block, modulate_blocks, step_blocks
from condmod_time._lstm import Lstm, State

_HIDDEN = (16, 32)  # of the network behind the LSTM, as published


class TinyTFilmConfig(condmod.ModulatorConfig):
    """Options of `tiny_tfilm`."""

    block: Block = 128
    """How many positions share one γ and β."""
    bottleneck: condmod.Width = 4
    """Channels that the LSTM reads and holds."""


class TinyTFilm(condmod.Modulator[TinyTFilmConfig, Nothing]):
    """Tiny TFiLM: y = γ_k·x + β_k, with [γ, β]_k = MLP(LSTM(W·max of x over block k + b)).

    W narrows to `bottleneck` channels, and the MLP widens again, through 16 and 32, with a ReLU
    behind each layer, the last too: γ and β are never negative. They are raw. All of it runs in
    float32 for half precision. The LSTM's state is carried by `step`, which makes a stream of
    chunks what one pass over all of them is.

    Shapes:
        x (B, T, C) or (B, C, T); no condition. A last block that is not whole is pooled as if
        zeros followed. The state is hidden and cell, (B, bottleneck) each.

    Init:
        torch's defaults. Not the identity: behind a ReLU that gives 0, β could not learn.

    Source:
        Comunità, Steinmetz and Reiss, NablAFx: A Framework for Differentiable Black-box and
        Gray-box Modeling of Audio Effects, 2025, arXiv:2502.11668, mcomunita/nablafx
        nablafx/modules.py: TinyTFiLM (MIT).
    """

    name = "tiny_tfilm"
    Config = TinyTFilmConfig
    kinds = frozenset({"self"})
    site_params = True
    modulate = modulate_blocks
    step = step_blocks

    def __init__(self, config: TinyTFilmConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.conv = blank_linear(site.features, config.bottleneck)
        self.lstm = Lstm(config.bottleneck, config.bottleneck)
        self.adaptor = mlp((config.bottleneck, *_HIDDEN, 2 * site.features), "relu")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.conv.reset_parameters()
        self.lstm.reset_parameters()
        reset_linears(self.adaptor)

    def generate(self, condition: condmod.Condition) -> Nothing:
        """Nothing; what modulates x is made of x."""
        self.accept_nothing(condition)
        return Nothing()

    def follow(
        self,
        pooled: Tensor,
        modulation: Nothing,  # noqa: ARG002
        state: State,
    ) -> tuple[ScaleShift, State]:
        """γ and β of each block, and the state behind the last."""
        h, state = self.lstm(_wide(self.conv, pooled), state)
        for layer in self.adaptor:
            h = _wide(layer, h) if isinstance(layer, nn.Linear) else layer(h)
        return ScaleShift(*h.chunk(2, -1)), state


def _wide(layer: nn.Linear, h: Tensor) -> Tensor:
    """A layer in the dtype of what it reads, which may be wider than its own."""
    return F.linear(h, layer.weight.to(h.dtype), layer.bias.to(h.dtype))
