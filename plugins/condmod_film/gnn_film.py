"""GNN-FiLM: messages of a graph, modulated by the node that they go to."""

from typing import Literal

from torch import Tensor

import condmod
from condmod.functional import (
    ScaleShift,
    activation,
    blank_linear,
    featurewise_affine,
    reset_constant,
)


class GnnFilmConfig(condmod.ModulatorConfig):
    """Options of `gnn_film`."""

    activation: Literal["relu", "none"] = "relu"
    """What a modulated message goes through, before messages are summed."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default as published, or y = relu(x) at the start."""


class GnnFilm(condmod.Modulator[GnnFilmConfig, ScaleShift]):
    """GNN-FiLM: y = relu(γ·x + β), with (β, γ) = W·c + b.

    x holds a message per edge, W_r·x_j of the edge's source node; c is the target node's vector.
    Modulation is all it does: the weights of relations, and the sum of a node's messages, are the
    model's. γ is raw; rows of W are [β, γ].

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2, as (1, E, C) for E edges; condition (B, D),
        aligned to x, or rows: Signal(nodes (1, N, D), index=targets (1, E)).

    Init:
        published: torch's Linear default (not the identity). identity: weight 0, γ = 1, β = 0:
        y = relu(x).

    Source:
        Brockschmidt, GNN-FiLM: Graph Neural Networks with Feature-wise Linear Modulation, 2019,
        arXiv:1906.12192, pyg-team/pytorch_geometric nn/conv/film_conv.py (MIT).
    """

    name = "gnn_film"
    Config = GnnFilmConfig
    kinds = frozenset({"global", "aligned", "rows"})
    generate = condmod.generate_linear

    def __init__(self, config: GnnFilmConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.proj = blank_linear(self.condition_dim, 2 * site.features)
        self.activation = activation(config.activation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.proj.reset_parameters()
        if self.config.init == "identity":
            reset_constant(self.proj, (0, 1))

    def prepare(self, condition: condmod.Condition) -> Tensor:
        """What the projection reads."""
        return self.accept(condition)

    def unpack(self, projected: Tensor) -> ScaleShift:
        """The projection's output as scale and shift."""
        shift, scale = projected.chunk(2, dim=-1)
        return ScaleShift(scale, shift)

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """relu(γ·x + β); a ReLU of what was rounded is the rounded ReLU."""
        dim = self.site.channel_dim
        y: Tensor = self.activation(
            featurewise_affine(x, modulation, dim, form="raw", where=self.where)
        )
        return y
