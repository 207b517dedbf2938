"""Attached to models of diffusers: what is promised, and what is known of their layers."""

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import condmod
from condmod.errors import ConditionError, SiteError
from condmod_hosts.diffusers import LAYERS

TIMES = torch.tensor([3, 7])
LEVELS = {"block_out_channels": (8, 12), "layers_per_block": 1, "norm_num_groups": 4}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
LATENTS = {**HEADS, "in_channels": 4, "out_channels": 4}
ROPE = {"patch_size": 1, "joint_attention_dim": 10, "num_layers": 1}


def unet() -> Any:
    return diffusers.UNet2DModel(
        sample_size=16,
        **LEVELS,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def dit() -> Any:
    options = {"num_layers": 2, "norm_num_groups": 4, "sample_size": 8, "num_embeds_ada_norm": 10}
    return diffusers.DiTTransformer2DModel(**LATENTS, **options, patch_size=2)


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        **LATENTS,
        sample_size=12,
        patch_size=2,
        num_layers=2,
        joint_attention_dim=10,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
    )


def on(*args: Any, **kwargs: Any) -> Callable[..., Tensor]:
    def run(model: Any, **options: Any) -> Tensor:
        sample: Tensor = model(*args, **kwargs, **options).sample
        return sample

    return run


def on_images() -> Callable[..., Tensor]:
    return on(torch.randn(2, 3, 16, 28), TIMES)


def on_latents() -> Callable[..., Tensor]:
    return on(torch.randn(2, 4, 8, 12), TIMES, torch.tensor([1, 2]))


def on_latents_and_text() -> Callable[..., Tensor]:
    return on(
        hidden_states=torch.randn(2, 4, 8, 12),
        encoder_hidden_states=torch.randn(2, 5, 10),
        pooled_projections=torch.randn(2, 6),
        timestep=TIMES,
    )


UNET = {"**.resnets.*": "film", "mid_block.attentions.0": "adaln_zero", "time_embedding": "film"}
DIT = {"transformer_blocks.*.ff": "adaln_zero", "transformer_blocks.*.norm1": "film"}
SD3 = {"transformer_blocks.*": "film", "transformer_blocks.*.attn.to_q": "dense_film"}
HOSTS = pytest.mark.parametrize(
    ("made", "patterns", "inputs"),
    [
        pytest.param(unet, UNET, on_images, id="unet"),
        pytest.param(dit, DIT, on_latents, id="dit"),
        pytest.param(sd3, SD3, on_latents_and_text, id="sd3"),
    ],
)


@HOSTS
def test_a_model_is_promised(made, patterns, inputs, law):
    law((made(), patterns, inputs()))


def test_plan_reads_the_features_of_a_unet():
    down = "down_blocks.1"
    names = ("conv_in", "time_embedding", down, f"{down}.resnets.0", f"{down}.attentions.0")
    plan = condmod.plan(unet(), dict.fromkeys(names, "film"), condition_dim=5)
    assert [(site.site.features, site.site.channel_dim) for site in plan] == [
        (8, 1),
        (32, -1),
        (12, 1),
        (12, 1),
        (12, 1),
    ]


def test_plan_reads_the_features_of_a_joint_block_behind_those_of_the_text():
    block = "transformer_blocks.0"
    names = (block, f"{block}.attn", f"{block}.ff_context")
    plan = condmod.plan(sd3(), dict.fromkeys(names, "film"), condition_dim=5)
    assert [(site.site.features, site.argument, site.item) for site in plan] == [
        (16, "hidden_states", 1),
        (16, "hidden_states", 0),
        (16, "hidden_states", 0),
    ]


def test_a_joint_block_leaves_the_stream_of_the_text(drawn):
    model = sd3().eval()
    conditioned = drawn(model, {"transformer_blocks.0": "film"})
    streams = []
    model.transformer_blocks[0].register_forward_hook(lambda *call: streams.append(call[2]))
    run = on_latents_and_text()
    with torch.no_grad():
        run(conditioned, condition=torch.randn(2, 5))
        with conditioned.disabled():
            run(model)
    (text, image), (plain_text, plain_image) = streams
    assert torch.equal(text, plain_text)
    assert not torch.allclose(image, plain_image)


def test_a_down_block_leaves_its_skip_connections(drawn):
    model = unet().eval()
    conditioned = drawn(model, {"down_blocks.0": "film"})
    given = []
    model.down_blocks[0].register_forward_hook(lambda *call: given.append(call[2]))
    with torch.no_grad():
        on_images()(conditioned, condition=torch.randn(2, 5))
    (onward, skips), *_ = given
    assert onward.shape == skips[-1].shape
    assert not torch.allclose(onward, skips[-1])


def test_what_an_up_block_reads_is_refused():
    with pytest.raises(SiteError) as caught:
        condmod.plan(unet(), {"up_blocks.0": ("film", "input")}, condition_dim=5)
    assert str(caught.value) == (
        "no site can stand at 'up_blocks.0' (input): it reads skip connections beside its "
        "features; its output can be conditioned"
    )


@HOSTS
def test_gradient_checkpointing_gives_the_same_gradients(made, patterns, inputs, drawn):
    conditioned, run = drawn(made(), patterns).train(), inputs()
    condition = torch.randn(2, 5, requires_grad=True)
    leaves = [condition, *conditioned.bank.parameters()]

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(3)  # labels are dropped alike
        return torch.autograd.grad(run(conditioned, condition=condition).square().mean(), leaves)

    expected = gradients()
    conditioned.enable_gradient_checkpointing()
    assert conditioned.base.is_gradient_checkpointing
    got = gradients()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert expected[0].any()


@HOSTS
def test_reentrant_checkpointing_is_refused(made, patterns, inputs, drawn):
    def reentrant(function: Any, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)

    conditioned = drawn(made(), patterns).train()
    conditioned.enable_gradient_checkpointing(reentrant)
    conditioned.base.requires_grad_(True)  # else nothing that checkpoints read has a gradient
    loss = inputs()(conditioned, condition=torch.randn(2, 5)).sum()
    with pytest.raises(ConditionError, match=r"lies inside reentrant activation checkpointing"):
        loss.backward()


def test_a_pipeline_samples_under_a_condition(drawn):
    conditioned = drawn(unet().eval(), UNET)
    pipeline = diffusers.DDPMPipeline(conditioned.base, diffusers.DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def sampled() -> Tensor:
        images = pipeline(
            batch_size=2,
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=3,
            output_type="np",
        ).images
        return torch.as_tensor(images)

    with conditioned.disabled():
        base = sampled()
    with conditioned.condition(torch.randn(2, 5), strength=0.0):
        assert torch.equal(sampled(), base)
    with conditioned.condition(torch.randn(2, 5)):
        assert not torch.allclose(sampled(), base, atol=1e-2)


def models() -> Iterator[tuple[nn.Module, Callable[[Any], Any]]]:
    """Models that hold every class that is known."""
    text, maps = torch.randn(2, 5, 10), torch.randn(2, 4, 8, 12)
    yield unet(), on_images()
    yield dit(), on_latents()
    yield sd3(), on_latents_and_text()
    yield (
        diffusers.UNet2DConditionModel(
            sample_size=16,
            **LEVELS,
            attention_head_dim=4,
            cross_attention_dim=10,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        on(torch.randn(2, 4, 16, 28), TIMES, text),
    )
    autoencoder = diffusers.AutoencoderKL(
        **LEVELS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    yield autoencoder, on(torch.randn(2, 3, 16, 28))
    pixart = diffusers.PixArtTransformer2DModel(
        **LATENTS,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=10,
    )
    none = {"resolution": None, "aspect_ratio": None}
    yield pixart, on(maps, text, TIMES, added_cond_kwargs=none)
    flux = {"encoder_hidden_states": text, "timestep": TIMES / 10}
    tokens = {"hidden_states": torch.randn(2, 6, 4)}
    places = {"img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3)}
    yield (
        diffusers.FluxTransformer2DModel(
            **HEADS,
            **ROPE,
            in_channels=4,
            num_single_layers=1,
            pooled_projection_dim=6,
            axes_dims_rope=(2, 2, 4),
        ),
        on(**tokens, **flux, **places, pooled_projections=torch.randn(2, 6)),
    )
    places = {"img_ids": torch.zeros(6, 4), "txt_ids": torch.zeros(5, 4)}
    yield (
        diffusers.Flux2Transformer2DModel(
            **HEADS, **ROPE, in_channels=4, num_single_layers=1, axes_dims_rope=(2, 2, 2, 2)
        ),
        on(**tokens, **flux, **places, guidance=torch.ones(2)),
    )
    yield (
        diffusers.QwenImageTransformer2DModel(**LATENTS, **ROPE, axes_dims_rope=(2, 2, 4)),
        on(
            **tokens,
            **flux,
            encoder_hidden_states_mask=torch.ones(2, 5, dtype=torch.long),
            img_shapes=[[(1, 2, 3)]] * 2,
        ),
    )
    video = {"encoder_hidden_states": text, "timestep": TIMES}
    yield (
        diffusers.CogVideoXTransformer3DModel(
            **LATENTS,
            time_embed_dim=6,
            text_embed_dim=10,
            num_layers=1,
            sample_width=12,
            sample_height=8,
            sample_frames=9,
            max_text_seq_length=5,
        ),
        on(hidden_states=torch.randn(2, 3, 4, 8, 12), **video),
    )
    wan = {"text_dim": 10, "freq_dim": 16, "ffn_dim": 20, "num_layers": 1}
    yield (
        diffusers.WanTransformer3DModel(**{**LATENTS, "attention_head_dim": 12}, **wan),
        on(hidden_states=torch.randn(2, 4, 3, 8, 12), **video),
    )
    cross = {"cross_attention_dim": 16, "caption_channels": 10, "num_layers": 1}
    yield (
        diffusers.LTXVideoTransformer3DModel(**LATENTS, **cross),
        on(
            hidden_states=torch.randn(2, 18, 4),
            **video,
            encoder_attention_mask=torch.ones(2, 5, dtype=torch.bool),
            num_frames=3,
            height=2,
            width=3,
        ),
    )
    heads = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
    yield (
        diffusers.SanaTransformer2DModel(**LATENTS, **cross, **heads, sample_size=8, patch_size=1),
        on(hidden_states=torch.randn(2, 4, 6, 10), **video),
    )


@pytest.fixture(scope="module")
def seen(record):
    return record(models(), LAYERS)


@pytest.mark.parametrize("path", LAYERS)
def test_a_known_layer_reads_and_gives_what_is_said_of_it(path, seen, agree):
    agree(seen[path])
