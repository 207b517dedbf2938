"""Layers of timm: most read and give (B, T, C) or (B, C, H, W), those of Swin (B, H, W, C)."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from condmod import Layer
from condmod_hosts._refusals import output_alone


def _flat(module: Any) -> int:
    """Where a patch embedding leaves the channels."""
    return -1 if module.flatten or module.output_fmt in {"NLC", "NHWC"} else 1


def _pointwise(mlp: Any) -> int:
    """An MLP of 1 x 1 convolutions has channels first."""
    return 1 if mlp.fc2.weight.ndim == 4 else -1


def _wide(mlp: Any) -> int:
    """What an MLP gives, of linear layers or of convolutions."""
    return int(mlp.fc2.weight.shape[0])


def _windows(_module: Any, _placement: str) -> str:
    return "its batch is windows, not samples; place the site on its block, or on that block's norm"


def _width(norm: Any) -> int:
    return int(norm.normalized_shape[0])


def _convolutions(first: str, last: str) -> Layer:
    """A block whose ends are convolutions of these names."""
    reads, gives = attrgetter(f"{first}.in_channels"), attrgetter(f"{last}.out_channels")
    return Layer(gives, reads, channel_dim=1)


def _named(package: str, names: str, layer: Layer) -> dict[str, Layer]:
    """What several classes of a module of timm have in common."""
    return {f"timm.{package}.{name}": layer for name in names.split()}


_NORM = Layer(_width)
_NORM_2D = Layer(_width, channel_dim=1)
_GROUP_NORM = Layer(attrgetter("num_channels"), channel_dim=1)
_CONV = Layer(attrgetter("out_channels"), attrgetter("in_channels"), channel_dim=1)
_ATTENTION = Layer(attrgetter("proj.out_features"))
_BLOCK = Layer(lambda m: _wide(m.mlp))

LAYERS: Mapping[str, Layer] = {
    **_named(
        "layers.norm",
        "LayerNorm LayerNormFp32 RmsNorm RmsNormFp32 SimpleNorm SimpleNormFp32",
        _NORM,
    ),
    **_named("layers.norm", "LayerNorm2d LayerNorm2dFp32 RmsNorm2d RmsNorm2dFp32", _NORM_2D),
    **_named("layers.norm", "SimpleNorm2d SimpleNorm2dFp32", _NORM_2D),
    **_named("layers.norm", "GroupNorm GroupNorm1", _GROUP_NORM),
    **_named("layers.norm_act", "LayerNormAct RmsNormAct", _NORM),
    **_named("layers.norm_act", "LayerNormAct2d RmsNormAct2d", _NORM_2D),
    **_named("layers.norm_act", "GroupNormAct GroupNorm1Act", _GROUP_NORM),
    "timm.layers.norm_act.BatchNormAct2d": Layer(attrgetter("num_features"), channel_dim=1),
    "timm.layers.norm_act.FrozenBatchNormAct2d": Layer(lambda m: m.weight.shape[0], channel_dim=1),
    **_named(
        "layers.mlp",
        "Mlp GluMlp GatedMlp GlobalResponseNormMlp ConvMlp",
        Layer(_wide, lambda m: m.fc1.weight.shape[1], channel_dim=_pointwise),
    ),
    "timm.layers.mlp.SwiGLU": Layer(_wide, attrgetter("fc1_g.in_features")),
    "timm.layers.layer_scale.LayerScale": Layer(lambda m: m.gamma.shape[0]),
    "timm.layers.layer_scale.LayerScale2d": Layer(lambda m: m.gamma.shape[0], channel_dim=1),
    "timm.layers.attention.Attention": _ATTENTION._replace(reads=attrgetter("qkv.in_features")),
    "timm.layers.patch_embed.PatchEmbed": Layer(
        attrgetter("proj.out_channels"), channel_dim=_flat, refuses=output_alone("an image")
    ),
    "timm.layers.conv_bn_act.ConvNormAct": _CONV,
    "timm.layers.conv2d_same.Conv2dSame": _CONV,
    **_named("layers.std_conv", "StdConv2d StdConv2dSame ScaledStdConv2d", _CONV),
    "timm.layers.squeeze_excite.SEModule": _convolutions("fc1", "fc2"),
    "timm.layers.linear.Linear": Layer(attrgetter("out_features"), attrgetter("in_features")),
    **_named("models.vision_transformer", "Block ResPostBlock", _BLOCK),
    **_named("models.vision_transformer_relpos", "RelPosBlock ResPostRelPosBlock", _BLOCK),
    **_named("models.eva", "EvaBlock EvaBlockPostNorm", _BLOCK),
    "timm.models.beit.Block": _BLOCK,
    "timm.models.cait.LayerScaleBlock": _BLOCK,
    "timm.models.vision_transformer_relpos.RelPosAttention": _ATTENTION,
    "timm.models.eva.EvaAttention": _ATTENTION,
    "timm.models.beit.Attention": _ATTENTION,
    "timm.models.cait.TalkingHeadAttn": _ATTENTION,
    "timm.models.mlp_mixer.MixerBlock": Layer(lambda m: _wide(m.mlp_channels)),
    "timm.models.metaformer.MetaFormerBlock": _BLOCK._replace(
        channel_dim=lambda m: _pointwise(m.mlp)
    ),
    **{
        f"timm.models.{package}.{name}": layer
        for package, block in (
            ("swin_transformer", "SwinTransformerBlock"),
            ("swin_transformer_v2", "SwinTransformerV2Block"),
        )
        for name, layer in (
            (block, Layer(attrgetter("dim"))),
            ("WindowAttention", Layer(attrgetter("dim"), refuses=_windows)),
            ("PatchMerging", Layer(attrgetter("out_dim"), attrgetter("dim"))),
        )
    },
    "timm.models.convnext.ConvNeXtBlock": _convolutions("conv_dw", "conv_dw"),
    **_named("models.resnet", "BasicBlock", _convolutions("conv1", "conv2")),
    **_named("models.resnet", "Bottleneck", _convolutions("conv1", "conv3")),
    **_named("models.resnetv2", "PreActBottleneck Bottleneck", _convolutions("conv1", "conv3")),
    "timm.models.regnet.Bottleneck": _convolutions("conv1", "conv3"),
    **{
        f"timm.models._efficientnet_blocks.{name}": layer
        for name, layer in (
            ("ConvBnAct", _convolutions("conv", "conv")),
            ("DepthwiseSeparableConv", _convolutions("conv_dw", "conv_pw")),
            ("InvertedResidual", _convolutions("conv_pw", "conv_pwl")),
        )
    },
}
