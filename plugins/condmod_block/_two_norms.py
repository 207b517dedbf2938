"""What Lumina and Z-Image share: RMS norms before and behind each of a block's sublayers."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor, nn

import condmod
from condmod.functional import Leaf, Norm, featurewise_scale, gated_residual, normalisation


class Attention(NamedTuple):
    """Scale before the first sublayer and gate behind it; leaves as in ScaleShift."""

    scale: Leaf
    gate: Leaf


class FeedForward(NamedTuple):
    """The same for the second sublayer; its type says which norms it goes with."""

    scale: Leaf
    gate: Leaf


Part: TypeAlias = Attention | FeedForward


def parts_of(projected: Tensor, parts: int) -> tuple[Part, ...]:
    """Rows [scale, gate] for each part in turn, as modulations."""
    chunks = projected.chunk(2 * parts, dim=-1)
    pairs = zip(chunks[0::2], chunks[1::2], strict=True)
    kinds = (Attention, FeedForward)[:parts]
    return tuple(kind(*pair) for kind, pair in zip(kinds, pairs, strict=True))


class TwoNorms(nn.Module):
    """x + tanh(gate)·RMS(f((1 + scale)·RMS(x))), each RMS with a weight of its own.

    Args:
        parts: 1 or 2 sublayers.
        site: where.
        eps: added to the mean square.
    """

    attention_norm1: Norm
    attention_norm2: Norm
    ffn_norm1: Norm
    ffn_norm2: Norm

    def __init__(self, parts: int, site: condmod.Site, eps: float) -> None:
        super().__init__()
        self.channel_dim = site.channel_dim
        for name in ("attention", "ffn")[:parts]:
            for place in (1, 2):
                norm = normalisation(
                    "rms", site.features, site.channel_dim, affine="weight", eps=eps
                )
                self.add_module(f"{name}_norm{place}", norm)

    def reset_parameters(self) -> None:
        """Every weight 1."""
        for norm in self.children():
            assert isinstance(norm, Norm)
            norm.reset_parameters()

    def enter(self, x: Tensor, part: Part, where: Callable[[], str]) -> Tensor:
        """(1 + scale)·RMS(x)."""
        norm = self.attention_norm1 if isinstance(part, Attention) else self.ffn_norm1
        return featurewise_scale(x, part.scale, self.channel_dim, norm=norm, where=where)

    def exit(self, x: Tensor, y: Tensor, part: Part, where: Callable[[], str]) -> Tensor:
        """x + tanh(gate)·RMS(y)."""
        norm = self.attention_norm2 if isinstance(part, Attention) else self.ffn_norm2
        return gated_residual(
            x, y, part.gate, self.channel_dim, form="tanh", norm=norm, where=where
        )


class Normed(Protocol):
    """A modulator that holds the norms."""

    norms: TwoNorms

    def where(self) -> str:
        """What errors call it."""


def enter_two_norms(
    self: Normed,
    x: Tensor,
    modulation: Part,
    sublayer: condmod.Sublayer | None,  # noqa: ARG001
) -> Tensor:
    """(1 + scale)·RMS(x)."""
    return self.norms.enter(x, modulation, self.where)


def exit_two_norms(
    self: Normed,
    x: Tensor,
    y: Tensor,
    modulation: Part,
    sublayer: condmod.Sublayer | None,  # noqa: ARG001
) -> Tensor:
    """X plus the normed and gated output of the sublayer."""
    return self.norms.exit(x, y, modulation, self.where)
