"""Cross-attention from features to a set of tokens."""

import torch
from torch import Tensor, nn

import condmod
from condmod.functional import blank_linear, normalisation
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


class CrossAttentionConfig(AttentionConfig):
    """Options of `cross_attention`."""

    null: bool = False
    """A learned key and value beside those of the tokens, always attended to, as in Imagen."""


class CrossAttention(condmod.Modulator[CrossAttentionConfig, Met]):
    """Cross-attention: y = x + W_o·softmax(q·kᵀ/√d)·v, with q of LN(x) and k, v of the tokens.

    d are the channels of a head. Keys and values are generated once per set of tokens, whatever
    its order; the norm, the queries and W_o are the features' side. A token that the mask hides
    never counts, whatever it holds. A sample whose mask hides all of them, which has no null
    either, is an error in eager mode on a CPU; elsewhere it attends to zeros: y = x + b_o.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2: each position asks by itself; condition
        (B, S, D), with a mask (B, S) if need be.

    Init:
        published: torch's Linear default, the norm's weight 1 and bias 0, null key and value
        N(0, 1) (Imagen). identity: out 0, so y = x.

    Source:
        Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762; as the conditioning of
        Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2021,
        arXiv:2112.10752, huggingface/diffusers models/attention_processor.py (Apache 2.0); the
        null as in Saharia et al., Imagen, 2022, arXiv:2205.11487.
    """

    name = "cross_attention"
    Config = CrossAttentionConfig
    kinds = frozenset({"set"})
    site_params = True
    null_key: nn.Parameter | None
    null_value: nn.Parameter | None

    def __init__(self, config: CrossAttentionConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        inner = inner_width(self.where(), site.features, config)
        normed = config.norm == "layer"
        self.norm = (
            normalisation("layer", site.features, affine="both", eps=1e-5) if normed else None
        )
        self.query = blank_linear(site.features, inner, bias=config.bias)
        self.key = blank_linear(self.condition_dim, inner, bias=config.bias)
        self.value = blank_linear(self.condition_dim, inner, bias=config.bias)
        for name in ("null_key", "null_value"):
            null = torch.empty(config.heads, inner // config.heads) if config.null else None
            self.register_parameter(name, None if null is None else nn.Parameter(null))
        self.out = blank_linear(inner, site.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        for layer in (self.query, self.key, self.value):
            layer.reset_parameters()
        for null in (self.null_key, self.null_value):
            if null is not None:
                nn.init.normal_(null)
        reset_out(self)

    def generate(self, condition: condmod.Condition) -> Met:
        """Key and value, each (B, heads, S, head_dim), and the mask where there is one."""
        tokens, mask = self.accept_set(condition, may_hide_all=self.config.null)
        null = None
        if self.null_key is not None and self.null_value is not None:
            null = (self.null_key, self.null_value)
        return keys_values(tokens, mask, self.key, self.value, self.config.heads, null)

    def modulate(self, x: Tensor, modulation: Met) -> Tensor:
        """X plus what its positions found among the tokens."""
        query = queries(self, x, modulation.key.shape[0])
        return joined(self, x, self.out(attend(query, modulation)))
