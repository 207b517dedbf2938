"""Layers of diffusers: U-Nets read and give (B, C, H, W), transformers (B, T, C)."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from condmod import Layer
from condmod_hosts._refusals import output_alone


def _named(package: str, names: str, layer: Layer) -> dict[str, Layer]:
    """What several classes of a module of diffusers have in common."""
    return {f"diffusers.models.{package}.{name}": layer for name in names.split()}


def _spatial(attention: Any) -> int:
    """An attention with a norm of its own stands in a U-Net and reads maps."""
    return 1 if attention.group_norm is not None or attention.spatial_norm is not None else -1


def _normed(norm: Any) -> int:
    return int(norm.norm.normalized_shape[0])


def _affine(block: Any) -> int:
    """The width of a block with a table of scales and shifts of its own."""
    return int(block.scale_shift_table.shape[-1])


def _flat(module: Any) -> int:
    return -1 if module.flatten else 1


_CHANNELS = Layer(attrgetter("out_channels"), attrgetter("channels"), channel_dim=1)
_PROJECTION = Layer(attrgetter("linear_2.out_features"), attrgetter("linear_1.in_features"))
_ATTENTION = Layer(attrgetter("out_dim"), attrgetter("query_dim"))
_FEED_FORWARD = Layer(lambda m: m.net[2].out_features, lambda m: m.net[0].proj.in_features)
_SECOND = Layer(lambda m: m.ff.net[2].out_features, item=1)  # the text's stream comes first
_AFFINE = Layer(_affine)
_DOWN = Layer(
    lambda m: m.resnets[-1].out_channels, lambda m: m.resnets[0].in_channels, channel_dim=1
)
_UP = Layer(
    lambda m: m.resnets[-1].out_channels,
    channel_dim=1,
    refuses=output_alone("skip connections beside its features"),
)

LAYERS: Mapping[str, Layer] = {
    "diffusers.models.resnet.ResnetBlock2D": Layer(
        attrgetter("conv2.out_channels"), attrgetter("conv1.in_channels"), channel_dim=1
    ),
    "diffusers.models.downsampling.Downsample2D": _CHANNELS,
    "diffusers.models.upsampling.Upsample2D": _CHANNELS,
    **_named(
        "unets.unet_2d_blocks",
        "DownBlock2D AttnDownBlock2D CrossAttnDownBlock2D DownEncoderBlock2D UNetMidBlock2D "
        "UNetMidBlock2DCrossAttn UpDecoderBlock2D",
        _DOWN,
    ),
    **_named("unets.unet_2d_blocks", "UpBlock2D AttnUpBlock2D CrossAttnUpBlock2D", _UP),
    "diffusers.models.attention_processor.Attention": _ATTENTION._replace(channel_dim=_spatial),
    "diffusers.models.attention.FeedForward": _FEED_FORWARD,
    "diffusers.models.attention.BasicTransformerBlock": Layer(attrgetter("dim")),
    "diffusers.models.attention.JointTransformerBlock": _SECOND,
    "diffusers.models.transformers.transformer_2d.Transformer2DModel": Layer(
        attrgetter("out_channels"), attrgetter("in_channels"), channel_dim=1
    ),
    "diffusers.models.transformers.transformer_flux.FluxTransformerBlock": _SECOND,
    "diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock": Layer(
        attrgetter("proj_out.out_features"), item=1
    ),
    "diffusers.models.transformers.transformer_flux.FluxAttention": _ATTENTION,
    "diffusers.models.transformers.transformer_flux2.Flux2TransformerBlock": Layer(
        attrgetter("ff.linear_out.out_features"), item=1
    ),
    "diffusers.models.transformers.transformer_flux2.Flux2SingleTransformerBlock": Layer(
        attrgetter("attn.out_dim"), item=1
    ),
    "diffusers.models.transformers.transformer_flux2.Flux2Attention": _ATTENTION,
    "diffusers.models.transformers.transformer_flux2.Flux2FeedForward": Layer(
        attrgetter("linear_out.out_features"), attrgetter("linear_in.in_features")
    ),
    "diffusers.models.transformers.transformer_qwenimage.QwenImageTransformerBlock": Layer(
        attrgetter("dim"), item=1
    ),
    "diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXBlock": _SECOND._replace(
        item=0
    ),
    "diffusers.models.transformers.transformer_wan.WanTransformerBlock": _AFFINE,
    "diffusers.models.transformers.transformer_wan.WanAttention": Layer(
        lambda m: m.to_out[0].out_features, attrgetter("to_q.in_features")
    ),
    "diffusers.models.transformers.transformer_ltx.LTXVideoTransformerBlock": _AFFINE,
    "diffusers.models.transformers.transformer_ltx.LTXAttention": Layer(attrgetter("out_dim")),
    "diffusers.models.transformers.sana_transformer.SanaTransformerBlock": _AFFINE,
    "diffusers.models.transformers.sana_transformer.GLUMBConv": Layer(
        attrgetter("conv_point.out_channels"),
        attrgetter("conv_inverted.in_channels"),
        channel_dim=1,
    ),
    "diffusers.models.normalization.RMSNorm": Layer(lambda m: m.dim[0]),
    "diffusers.models.normalization.FP32LayerNorm": Layer(lambda m: m.normalized_shape[0]),
    **_named(
        "normalization",
        "AdaLayerNorm AdaLayerNormZero AdaLayerNormZeroSingle SD35AdaLayerNormZeroX",
        Layer(_normed),
    ),
    "diffusers.models.normalization.AdaLayerNormContinuous": Layer(
        lambda m: m.linear.out_features // 2
    ),
    "diffusers.models.embeddings.PatchEmbed": Layer(
        attrgetter("proj.out_channels"), channel_dim=_flat, refuses=output_alone("a map of latents")
    ),
    "diffusers.models.embeddings.TimestepEmbedding": _PROJECTION,
    "diffusers.models.embeddings.PixArtAlphaTextProjection": _PROJECTION,
}
