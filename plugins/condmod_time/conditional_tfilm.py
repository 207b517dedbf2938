"""TFiLM of neural audio effects, whose LSTM reads the effect's controls too."""

from torch import Tensor

import condmod
from condmod.functional import ScaleShift
from condmod_time._blocks import Block, Controls, joined, modulate_blocks, step_blocks
from condmod_time._lstm import Lstm, State


class ConditionalTFilmConfig(condmod.ModulatorConfig):
    """Options of `conditional_tfilm`."""

    block: Block = 128
    """How many positions share one γ and β."""


class ConditionalTFilm(condmod.Modulator[ConditionalTFilmConfig, Controls]):
    """Conditional TFiLM: y = γ_k·x + β_k, with [γ, β]_k = LSTM([max of x over block k, c]).

    γ is raw. The condition is held along the blocks, and is not activated. The LSTM runs in
    float32 for half precision. Its state is carried by `step`, which makes a stream of chunks
    what one pass over all of them is.

    Shapes:
        x (B, T, C) or (B, C, T); condition (B, D). A last block that is not whole is pooled as if
        zeros followed. The state is hidden and cell, (B, 2C) each.

    Init:
        torch's LSTM default. Not the identity, and no start is: γ is a sigmoid times a tanh,
        within ±1.

    Source:
        mcomunita/nablafx nablafx/modules.py: TFiLM (MIT); Comunità, Steinmetz, Phan and Reiss,
        Modelling black-box audio effects with time-varying feature modulation, 2022,
        arXiv:2211.00497.
    """

    name = "conditional_tfilm"
    Config = ConditionalTFilmConfig
    kinds = frozenset({"global"})
    site_params = True
    modulate = modulate_blocks
    step = step_blocks

    def __init__(self, config: ConditionalTFilmConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.lstm = Lstm(site.features + self.condition_dim, 2 * site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.lstm.reset_parameters()

    def generate(self, condition: condmod.Condition) -> Controls:
        """The condition itself, which the LSTM reads with every block."""
        return Controls(self.accept(condition))

    def follow(
        self, pooled: Tensor, modulation: Controls, state: State
    ) -> tuple[ScaleShift, State]:
        """γ and β of each block, and the state behind the last."""
        parts, state = self.lstm(joined(self, pooled, modulation.controls), state)
        return ScaleShift(*parts.chunk(2, -1)), state
