"""Attached to timm's models: what is promised, and what is known of their layers."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import condmod
from condmod.errors import SiteError
from condmod_hosts.timm import LAYERS

VIT = {"img_size": (32, 48), "embed_dim": 12, "depth": 2, "num_heads": 2}
SWIN = {
    "img_size": (32, 64),
    "window_size": 4,
    "embed_dim": 12,
    "depths": (1, 1),
    "num_heads": (2, 2),
}
STAGES = {"depths": (1, 1, 1, 1), "dims": (6, 9, 12, 14)}
ALONE = (  # layers that no small model here holds: how they are built and what they read
    ("LayerNormFp32 RmsNorm RmsNormFp32 SimpleNorm SimpleNormFp32", (6,), (2, 5, 6)),
    ("LayerNormAct RmsNormAct GatedMlp SwiGLU", (6,), (2, 5, 6)),
    ("GroupNorm GroupNormAct", (6, 2), (2, 6, 5, 4)),
    ("GroupNorm1 GroupNorm1Act LayerNorm2dFp32 LayerNormAct2d", (6,), (2, 6, 5, 4)),
    ("RmsNorm2d RmsNorm2dFp32 RmsNormAct2d SimpleNorm2d SimpleNorm2dFp32", (6,), (2, 6, 5, 4)),
    ("FrozenBatchNormAct2d ConvMlp LayerScale2d", (6,), (2, 6, 5, 4)),
    ("Conv2dSame StdConv2d StdConv2dSame ScaledStdConv2d ConvNormAct", (6, 8, 3), (2, 6, 9, 9)),
)


def vit(timm: ModuleType) -> nn.Module:
    drops = {"drop_rate": 0.1, "proj_drop_rate": 0.1}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=7, **drops)
    return model


def resnet(timm: ModuleType) -> nn.Module:
    resnet = timm.models.resnet
    channels = (8, 12, 16, 20)
    model: nn.Module = resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), 7, channels=channels)
    return model


def on_images(height: int = 32, width: int = 48) -> Callable[..., Tensor]:
    images = torch.randn(2, 3, height, width)
    return lambda model, **options: model(images, **options)


@pytest.mark.parametrize("placed", [{"blocks.*.norm*": "film"}, {"blocks.*.mlp": "adaln_zero"}])
def test_a_vit_is_promised(timm, law, placed):
    law((vit(timm), placed, on_images()))


def test_a_resnet_is_promised(timm, law):
    law((resnet(timm), {"layer*.*.bn2": "film", "layer*.*": "dense_film"}, on_images()))


def test_plan_reads_the_features_of_a_vit(timm):
    patterns = ("patch_embed", "blocks.0", "blocks.0.norm1", "blocks.0.attn", "blocks.0.mlp.fc1")
    plan = condmod.plan(vit(timm), dict.fromkeys(patterns, "film"), condition_dim=5)
    assert [(site.site.features, site.site.channel_dim) for site in plan] == [
        (12, -1),
        (12, -1),
        (12, -1),
        (12, -1),
        (48, -1),
    ]


def test_plan_reads_the_features_of_a_resnet(timm):
    patterns = {"bn1": "film", "layer2.0": ("film", "input"), "layer2.0.conv2": "film"}
    plan = condmod.plan(resnet(timm), patterns, condition_dim=5)
    assert [(site.site.features, site.site.channel_dim) for site in plan] == [
        (64, 1),
        (8, 1),
        (12, 1),
    ]


def test_what_a_patch_embedding_reads_is_refused(timm):
    with pytest.raises(SiteError) as caught:
        condmod.plan(vit(timm), {"patch_embed": ("film", "input")}, condition_dim=5)
    assert str(caught.value) == (
        "no site can stand at 'patch_embed' (input): it reads an image; its output can be "
        "conditioned"
    )


def test_an_attention_over_windows_is_refused(timm):
    swin = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
    with pytest.raises(SiteError, match=r"its batch is windows, not samples; place the site on"):
        condmod.plan(swin, {"**.attn": "film"}, condition_dim=5)


def test_a_layer_whose_weight_alone_is_read_is_found_by_an_example(timm):
    beit = timm.create_model("beit_base_patch16_224", **VIT)
    with pytest.raises(SiteError, match=r"'blocks\.0\.attn\.qkv' would never act: the example"):
        condmod.plan(
            beit,
            {"blocks.*.attn.qkv": "film"},
            condition_dim=5,
            example=torch.randn(2, 3, 32, 48),
        )


def models(timm: ModuleType) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Models and layers that hold every class that is known."""

    def made(name: str, height: int = 32, width: int = 48, **options: Any) -> Any:
        return timm.create_model(name, num_classes=7, **options), on_images(height, width)

    yield made("vit_tiny_patch16_224", **VIT, init_values=1e-5)
    yield made("vit_tiny_patch16_224", **VIT, block_fn=timm.models.vision_transformer.ResPostBlock)
    relative = {**VIT, "rel_pos_type": "bias"}
    yield made("vit_relpos_small_patch16_224", **relative)
    relpos = timm.models.vision_transformer_relpos
    yield made("vit_relpos_small_patch16_224", **relative, block_fn=relpos.ResPostRelPosBlock)
    eva = {"img_size": (28, 42), "embed_dim": 24, "depth": 1, "num_heads": 2}
    yield made("eva02_tiny_patch14_224", 28, 42, **eva)
    yield made("eva02_tiny_patch14_224", 28, 42, **eva, use_post_norm=True)
    yield made("beit_base_patch16_224", **VIT)
    yield made("cait_xxs24_224", **VIT)
    mixer = timm.models.mlp_mixer.MlpMixer
    yield mixer(img_size=(32, 48), patch_size=16, num_blocks=1, embed_dim=12), on_images()
    glu = timm.layers.GluMlp
    yield mixer(img_size=(32, 48), num_blocks=1, embed_dim=12, mlp_layer=glu), on_images()
    yield made("swin_tiny_patch4_window7_224", 32, 64, **SWIN)
    yield made("swinv2_tiny_window8_256", 32, 64, **SWIN)
    yield made("convnext_atto", 80, 104, **STAGES)
    yield made("convnextv2_atto", 80, 104, **STAGES)
    yield made("convnextv2_tiny", 80, 104, **STAGES)  # channels last inside
    former = timm.models.metaformer
    mixers = [former.Pooling, former.Attention]  # of maps, and of positions
    norms = [timm.layers.LayerNorm2d, timm.layers.LayerNorm]
    stages = {"depths": (1, 1), "dims": (8, 32), "token_mixers": mixers, "norm_layers": norms}
    yield former.MetaFormer(**stages, use_mlp_head=False), on_images(80, 104)
    yield resnet(timm), on_images()
    bottleneck = timm.models.resnet.Bottleneck
    yield timm.models.resnet.ResNet(bottleneck, (1,) * 4, channels=(6, 8, 10, 12)), on_images()
    small = {"layers": (1, 1), "channels": (12, 16), "stem_chs": 8, "act_layer": "relu"}
    yield made("resnetv2_50", **small)
    yield made("resnetv2_50", **small, preact=False)
    yield made("regnety_002", 80, 104)
    yield made("efficientnet_lite0", 80, 104)
    yield made("tf_efficientnet_lite0", 80, 104)
    yield made("mobilenetv3_small_050", 80, 104)
    yield (
        nn.Sequential(timm.layers.PatchEmbed(32, 16, embed_dim=6, flatten=False)),
        on_images(32, 32),
    )
    for names, options, shape in ALONE:
        x = torch.randn(shape)
        for name in names.split():
            yield nn.Sequential(getattr(timm.layers, name)(*options)), lambda model, x=x: model(x)


@pytest.fixture(scope="module")
def seen(timm, record):
    return record(models(timm), LAYERS)


@pytest.mark.parametrize("path", LAYERS)
def test_a_known_layer_reads_and_gives_what_is_said_of_it(path, seen, agree):
    agree(seen[path])
