"""A set of embedded tokens, kept as a set or pooled into one vector."""

from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

import condmod
from condmod.functional import blank_linear


class TokensConfig(condmod.NullableConfig):
    """Options of `tokens`."""

    features: condmod.Width
    """F, the width of the tokens that come in."""
    dim: condmod.Width = 256
    """Width of what comes out, where nothing else sets it."""
    mode: Literal["pool", "keep"] = "pool"
    """Pool the tokens into one vector for modulators, or keep them as a set for attention."""
    pooling: Literal["mean", "attention"] = "mean"
    """The mean of the tokens, or one weighted by a learned query."""

    @model_validator(mode="after")
    def _kept_is_not_pooled(self) -> Self:
        if self.mode == "keep" and self.pooling != "mean":
            raise ValueError(f"pooling={self.pooling!r} needs mode='pool'; 'keep' pools nothing")
        return self


class Tokens(condmod.Encoder[TokensConfig]):
    """Linear of a set of tokens v_s: e_s = W·v_s + b (keep), or e = W·Σ a_s·v_s + b (pool).

    a_s are equal for the mean, softmax(u·v_s) for attention; hidden tokens have none, and are b
    where they are kept. A mask goes along with what is kept, and is used up by pooling: one that
    hides every token of a sample that is not absent is an error there, in eager mode on a CPU;
    elsewhere such a sample is b.
    The null of an absent sample is one vector, at each of its tokens where they are kept, with
    none of them hidden.

    Shapes:
        v (B, S, F), with a mask (B, S) if need be -> (B, D) by pool, or (B, S, D) with the mask
        by keep; floating.

    Init:
        torch's Linear default, for W, b and u; the null N(0, 0.02²).

    Source:
        The plain form in common practice; one query as in Ilse et al., Attention-based Deep
        Multiple Instance Learning, 2018, arXiv:1802.04712, without its hidden layer.
    """

    name = "tokens"
    Config = TokensConfig

    def __init__(self, config: TokensConfig, out_dim: int | None) -> None:
        super().__init__(config, out_dim or config.dim)
        attends = config.pooling == "attention"
        self.query = blank_linear(config.features, 1, bias=False) if attends else None
        self.proj = blank_linear(config.features, self.out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        if self.query is not None:
            self.query.reset_parameters()
        self.proj.reset_parameters()
        self.reset_null()

    def encode(self, signal: condmod.Signal) -> Tensor | condmod.Signal:
        """Tokens (B, S, F) to (B, D), or to (B, S, D)."""
        width = self.config.features
        value = self.read(signal, {3: f"a set of tokens, (B, S, {width})"})
        if not value.is_floating_point():
            raise condmod.ConditionError(
                f"tokens takes embedded tokens; got {value.dtype}; token ids go through an "
                "embedding first"
            )
        if value.shape[-1] != width or not value.shape[1]:
            raise condmod.ShapeError(
                f"tokens takes one token or more of features={width}; got {tuple(value.shape)}"
            )
        value, keep = value.to(self.dtype), self.config.mode == "keep"
        mask = self.read_mask(signal, value.shape[:2], may_hide_all=keep)
        if mask is not None:
            # what a hidden token holds, NaN too, reaches neither the output nor a gradient
            value = torch.where(mask[..., None], value, 0)
        if keep:
            kept: Tensor = self.proj(value)
            return kept
        return condmod.Signal(self.proj(self._pooled(value, mask)))

    def _pooled(self, value: Tensor, mask: Tensor | None) -> Tensor:
        """The weighted sum of the tokens that the mask shows, where hidden ones are 0, (B, F)."""
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        if self.query is None:
            if mask is None:
                return wide.mean(1).to(value.dtype)
            return (wide.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)).to(value.dtype)
        scores: Tensor = self.query(value)[..., 0].to(wide.dtype)
        if mask is not None:
            # finite, so that a sample without a token has weights: of tokens that are all zero
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        pooled = (scores.softmax(1)[..., None] * wide).sum(1)
        return pooled.to(value.dtype)
