"""Decoupled cross-attention of IP-Adapter."""

from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import condmod
from condmod.functional import blank_linear, fill, normalisation
from condmod_attention._attending import (
    AttentionConfig,
    Met,
    attend,
    inner_width,
    joined,
    keys_values,
    queries,
    reset_out,
)

LARGEST = 10.0


class DecoupledAttentionConfig(AttentionConfig):
    """Options of `decoupled_attention`."""

    scale: Annotated[float, Field(ge=0.0, le=LARGEST)] = 1.0
    """λ, which `set_scale` changes later: 0 is the text alone, 1 the image in full."""


class TextImage(NamedTuple):
    """Keys and values of the text and of the image."""

    text: Met
    image: Met


class DecoupledAttention(condmod.Modulator[DecoupledAttentionConfig, TextImage]):
    """Decoupled attention: y = x + W_o·(Attn(q, K_t, V_t) + λ·Attn(q, K_i, V_i)), q of LN(x).

    One query meets the tokens of a text and those of an image, each with keys and values of its
    own; those of the image have no bias. λ is no parameter and in no state dict; it is applied in
    `modulate`, so modulations that were kept follow it too. Masks are as in `cross_attention`.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition {"text": (B, S, D), "image":
        (B, R, D)}, each with a mask if need be.

    Init:
        published: torch's Linear default; keys and values of the image begin as those of the
        text. identity: out 0, so y = x.

    Source:
        Ye et al., IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion
        Models, 2023, arXiv:2308.06721; huggingface/diffusers models/attention_processor.py
        (Apache 2.0).
    """

    name = "decoupled_attention"
    Config = DecoupledAttentionConfig
    kinds = frozenset({"set"})
    sets = ("text", "image")
    site_params = True
    scale: Tensor

    def __init__(self, config: DecoupledAttentionConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        inner = inner_width(self.where(), site.features, config)
        layer = config.norm == "layer"
        self.norm = (
            normalisation("layer", site.features, affine="both", eps=1e-5) if layer else None
        )
        self.query = blank_linear(site.features, inner, bias=config.bias)
        self.key = blank_linear(self.condition_dim, inner, bias=config.bias)
        self.value = blank_linear(self.condition_dim, inner, bias=config.bias)
        self.key_image = blank_linear(self.condition_dim, inner, bias=False)
        self.value_image = blank_linear(self.condition_dim, inner, bias=False)
        self.out = blank_linear(inner, site.features)
        self.register_buffer("scale", torch.empty(()), persistent=False)
        self.register_load_state_dict_post_hook(_keep_scale)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh, and set the scale of the config."""
        for layer in (self.query, self.key, self.value):
            layer.reset_parameters()
        fill(self.key_image.weight, self.key.weight)
        fill(self.value_image.weight, self.value.weight)
        reset_out(self)
        self.set_scale(self.config.scale)

    def set_scale(self, scale: float) -> None:
        """Set λ, in place: a compiled model takes it as it is.

        Args:
            scale: from 0, the text alone, to 10.

        Raises:
            ConditionError: below 0 or above 10.
        """
        if not 0 <= scale <= LARGEST:
            raise condmod.ConditionError(
                f"{self.where()}: scale is from 0 (the text alone) to {LARGEST:g}; got {scale}"
            )
        self._told = float(scale)
        self.scale.fill_(self._told)

    def generate(self, condition: condmod.Condition) -> TextImage:
        """Key and value of both, each (B, heads, tokens, head_dim), with masks where there are."""
        sets, heads = self.accept_sets(condition), self.config.heads
        return TextImage(
            keys_values(*sets["text"], self.key, self.value, heads),
            keys_values(*sets["image"], self.key_image, self.value_image, heads),
        )

    def modulate(self, x: Tensor, modulation: TextImage) -> Tensor:
        """X plus what its positions found in the text and, λ times, in the image."""
        query = queries(self, x, modulation.text.key.shape[0])
        text, image = (attend(query, met) for met in modulation)
        # through W_o by themselves: half precision would round a small λ·image away beside the text
        found, change = self.out(text), F.linear(image, self.out.weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        sum_ = torch.addcmul(found.to(wide), change.to(wide), self.scale.to(wide))
        return joined(self, x, sum_)


def _keep_scale(module: Any, _: Any) -> None:
    """A state dict has no scale, and the memory that it fills may be new (meta, to_empty)."""
    if module.scale.is_meta:
        module.scale = torch.empty_like(module.scale, device=module.query.weight.device)
    module.scale.fill_(module._told)
