"""TFiLM of Birnbaum et al., and its form with a shift."""

import torch
from torch import Tensor, nn

import condmod
from condmod.functional import Nothing, Scale, ScaleShift, fill
from condmod_time._blocks import Block, modulate_blocks, step_blocks
from condmod_time._lstm import Lstm, State


class TFilmConfig(condmod.ModulatorConfig):
    """Options of `tfilm`."""

    block: Block = 128
    """How many positions share one γ; the official models have 128 at their first level."""
    shift: bool = False
    """Generate β too, as in nablafx; the paper's code has γ alone."""


class TFilm(condmod.Modulator[TFilmConfig, Nothing]):
    """TFiLM: y = γ_k·x in block k, with γ_1, γ_2, ... = LSTM(max of x over each block).

    With `shift` y = γ_k·x + β_k, the LSTM's output being [γ, β]. γ is raw. The LSTM runs in
    float32 for half precision. Its state is carried by `step`, which makes a stream of chunks
    what one pass over all of them is.

    Shapes:
        x (B, T, C) or (B, C, T); no condition. A last block that is not whole is pooled as if
        zeros followed. The state is hidden and cell, (B, C) each, or (B, 2C) with `shift`.

    Init:
        Keras' LSTM default as in the official code: Glorot uniform, recurrent weights orthogonal,
        bias 1 at the forget gates and 0 elsewhere. With `shift` torch's LSTM default as in
        nablafx. Not the identity, and no start is: γ is a sigmoid times a tanh, within ±1.

    Source:
        Birnbaum et al., Temporal FiLM: Capturing Long-Range Sequence Dependencies with
        Feature-Wise Modulations, 2019, arXiv:1909.06628, kuleshov/audio-super-res keras_layer.py
        (MIT); with a shift mcomunita/nablafx nablafx/modules.py (MIT).
    """

    name = "tfilm"
    Config = TFilmConfig
    kinds = frozenset({"self"})
    site_params = True
    modulate = modulate_blocks
    step = step_blocks

    def __init__(self, config: TFilmConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.lstm = Lstm(site.features, (1 + config.shift) * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        if self.config.shift:
            self.lstm.reset_parameters()
            return
        hidden = self.lstm.hidden
        nn.init.xavier_uniform_(self.lstm.weight_ih_l0)
        weight = torch.empty(4 * hidden, hidden, device=self.lstm.weight_hh_l0.device)
        fill(self.lstm.weight_hh_l0, nn.init.orthogonal_(weight))
        gates = torch.tensor([0.0, 1.0, 0.0, 0.0])  # input, forget, cell, output
        fill(self.lstm.bias_ih_l0, gates.repeat_interleave(hidden))
        nn.init.zeros_(self.lstm.bias_hh_l0)

    def generate(self, condition: condmod.Condition) -> Nothing:
        """Nothing; what modulates x is made of x."""
        self.accept_nothing(condition)
        return Nothing()

    def follow(
        self,
        pooled: Tensor,
        modulation: Nothing,  # noqa: ARG002
        state: State,
    ) -> tuple[Scale | ScaleShift, State]:
        """γ of each block, and β with `shift`, and the state behind the last."""
        parts, state = self.lstm(pooled, state)
        if self.config.shift:
            return ScaleShift(*parts.chunk(2, -1)), state
        return Scale(parts), state
