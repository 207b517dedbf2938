"""What the attentions of this family share: options, heads, keys and values, the pass over x."""

from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

import condmod
from condmod.functional import BatchNorm, Norm, in_layout_of, reset_constant, widened


class AttentionConfig(condmod.ModulatorConfig):
    """Options of every attention."""

    heads: Annotated[int, Field(ge=1, le=1024)] = 8
    """H, how many heads attend side by side."""
    head_dim: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Channels of one head; None: an equal share of the features."""
    norm: Literal["layer", "none"] = "layer"
    """LN with weight and bias before the query, or none where x comes normed."""
    bias: bool = False
    """A bias for query, key and value, as in PixArt and in torch's own; out always has one."""
    residual: bool = True
    """Add x; False where what is around the attention does."""
    init: Literal["published", "identity"] = "published"
    """Torch's Linear default, or out at 0, so that y = x at the start."""

    @model_validator(mode="after")
    def _identity_is_reachable(self) -> Self:
        if self.init == "identity" and not self.residual:
            raise ValueError("init='identity' needs residual=True: y = x is x with nothing added")
        return self


class KeyValue(NamedTuple):
    """What queries meet: key and value, each (B, heads, S, head_dim)."""

    key: Tensor
    value: Tensor


class MaskedKeyValue(NamedTuple):
    """Key and value as in KeyValue, with a mask (B, S), True where a token counts."""

    key: Tensor
    value: Tensor
    mask: Tensor


Met = KeyValue | MaskedKeyValue


class Attending(Protocol):
    """A modulator whose features ask."""

    config: Any
    site: condmod.Site
    norm: Norm | BatchNorm | None
    query: nn.Linear
    out: nn.Linear

    def check_channels(self, x: Tensor) -> None:
        """Check the features' channels."""

    def where(self) -> str:
        """What errors call it."""


def inner_width(where: str, features: int, config: AttentionConfig) -> int:
    """The channels of all heads together.

    Raises:
        SiteError: the heads do not divide the features.
    """
    if config.head_dim is None and features % config.heads:
        fitting = [n for n in range(1, features + 1) if features % n == 0]
        raise condmod.SiteError(
            f"{where}: heads={config.heads} does not divide features={features}; choose heads "
            f"from {fitting}, or say head_dim, the channels of one head"
        )
    return config.heads * (config.head_dim or features // config.heads)


def reset_out(self: Attending) -> None:
    """Draw the layer that ends the attention, or set it to 0."""
    if self.norm is not None:
        self.norm.reset_parameters()
    self.out.reset_parameters()
    if self.config.init == "identity":
        reset_constant(self.out, (0,))


def keys_values(
    tokens: Tensor,
    mask: Tensor | None,
    key: nn.Linear,
    value: nn.Linear,
    heads: int,
    null: tuple[Tensor, Tensor] | None = None,
) -> Met:
    """Key and value of tokens (B, S, D), before them those of the null, each (heads, head_dim)."""
    if mask is not None:
        # what a hidden token holds, NaN too, meets no weight
        tokens = torch.where(mask[..., None], tokens, 0)
    k, v = (_heads(layer(tokens), heads) for layer in (key, value))
    if null is not None:
        k, v = (_led(own, all_) for own, all_ in zip(null, (k, v), strict=True))
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    elif mask is not None:
        # a sample without a token attends to zeros; a softmax over nothing is NaN on some devices
        some = mask.any(1, keepdim=True)
        v = torch.where(some[..., None, None], v, 0)
        mask = mask | ~some
    return KeyValue(k, v) if mask is None else MaskedKeyValue(k, v, mask)


def queries(self: Attending, x: Tensor, batch: int) -> Tensor:
    """The features' queries, (B, heads, T, head_dim), one for each position.

    Raises:
        ShapeError: x has other channels, or another batch than the tokens.
    """
    self.check_channels(x)
    if x.shape[0] != batch:
        raise condmod.ShapeError(
            f"{self.where()}: the tokens are of {batch} sample(s), the features {tuple(x.shape)} "
            f"of {x.shape[0]}; a single sample is not repeated"
        )
    last = x.movedim(self.site.channel_dim, -1)
    flat = last.flatten(1, -2) if x.ndim > 2 else last[:, None]
    normed = widened(flat, self.norm, self.where).to(self.query.weight.dtype)
    return _heads(self.query(normed), self.config.heads)


def attend(query: Tensor, met: Met) -> Tensor:
    """softmax(q·kᵀ/√head_dim)·v of all heads, (B, T, heads·head_dim)."""
    mask = met.mask[:, None, None] if isinstance(met, MaskedKeyValue) else None
    key, value = met.key.to(query.dtype), met.value.to(query.dtype)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.transpose(1, 2).flatten(2)


def joined(self: Attending, x: Tensor, found: Tensor) -> Tensor:
    """What the positions found, (B, T, C), and x where there is a residual."""
    dim = self.site.channel_dim
    y = found.reshape(x.movedim(dim, -1).shape).movedim(-1, dim)
    if self.config.residual:
        y = widened(x, None, self.where) + y
    return in_layout_of(x, y.to(x.dtype))


def _heads(h: Tensor, heads: int) -> Tensor:
    """(B, T, heads·head_dim) as (B, heads, T, head_dim)."""
    return h.reshape(*h.shape[:2], heads, h.shape[-1] // heads).transpose(1, 2)


def _led(null: Tensor, all_: Tensor) -> Tensor:
    """Keys or values with the null's, (heads, head_dim), before them."""
    first = null.to(all_.dtype)[None, :, None].expand(all_.shape[0], -1, -1, -1)
    return torch.cat([first, all_], 2)
