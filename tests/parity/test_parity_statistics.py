"""Norms whose statistics span positions or samples, and EDM2's modulation, against packages."""

import torch
from torch.nn.functional import silu

from condmod import create

DTYPE = torch.float64


def inputs(*shapes):
    torch.manual_seed(1)
    return [torch.randn(shape, dtype=DTYPE) for shape in shapes]


def stirred(module):
    """Away from any special start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def test_adain_is_the_filter_of_diffusers_ltx_upsampler(parity, peer):
    pipeline = peer(
        "diffusers.pipelines.ltx.pipeline_ltx_latent_upsample"
    ).LTXLatentUpsamplePipeline
    ours = create("adain(eps=1e-15)", features=6, condition_dim=6, channel_dim=1)  # theirs has none
    x, style = inputs((2, 6, 3, 5, 4), (2, 6, 2, 3, 4))
    want = pipeline.adain_filter_latent(None, x, style)
    parity("adain", "diffusers", "adain_filter_latent", ours(x, style), want, x=x, style=style)


def test_adain1d_is_styletts2s(parity, peer):
    theirs = peer("styletts2.Modules.hifigan").AdaIN1d(style_dim=8, num_features=16)
    stirred(theirs).to(DTYPE)
    ours = create("adain1d", features=16, condition_dim=8, channel_dim=1).to(DTYPE)
    ours.proj.load_state_dict(theirs.fc.state_dict())
    x, s = inputs((2, 16, 9), (2, 8))
    parity("adain1d", "styletts2", "AdaIN1d", ours(x, s), theirs(x, s), x=x, s=s)


def test_biggan_batch_norm_is_that_of_pytorch_pretrained_biggan_in_evaluation(parity, peer):
    theirs = peer("pytorch_pretrained_biggan.model").BigGANBatchNorm(16, condition_vector_dim=8)
    theirs = stirred(theirs).to(DTYPE).eval()
    for value in (theirs.running_means, theirs.running_vars):
        torch.nn.init.uniform_(value, 0.5, 2.0)
    x, c = inputs((2, 16, 5, 6), (2, 8))
    want = theirs(x, 1.0, c)  # truncation 1: the last of its 51 statistics
    ours = create("biggan_batch_norm(eps=1e-4)", features=16, condition_dim=8, channel_dim=1)
    ours = ours.to(DTYPE).eval()
    with torch.no_grad():
        ours.proj.weight.copy_(torch.cat([theirs.scale.weight, theirs.offset.weight]))
    ours.norm.running_mean.copy_(theirs.running_means[-1])
    ours.norm.running_var.copy_(theirs.running_vars[-1])
    parity(
        "biggan_batch_norm",
        "pytorch-pretrained-biggan",
        "BigGANBatchNorm",
        ours(x, c),
        want,
        x=x,
        c=c,
    )


def test_edm2_is_the_block_of_denoising_diffusion_pytorch_up_to_its_activation(parity, peer):
    karras = peer("denoising_diffusion_pytorch.karras_unet")
    theirs = torch.nn.Sequential(karras.Linear(8, 16), karras.Gain()).to(DTYPE).eval()
    stirred(theirs)
    ours = create("edm2(eps=0.0)", features=16, condition_dim=8, channel_dim=1).to(DTYPE)
    with torch.no_grad():
        ours.weight.copy_(theirs[0].weight)
        ours.gain.copy_(theirs[1].gain)
    x, c = inputs((2, 16, 5, 6), (2, 8))
    want = karras.MPSiLU()(x * (theirs(c) + 1)[..., None, None])
    got = ours(x, c)
    goal = torch.randn_like(x)
    weight, gain = torch.autograd.grad((got * goal).sum(), [ours.weight, ours.gain])
    other = torch.autograd.grad((want * goal).sum(), [theirs[0].weight, theirs[1].gain])
    parity(
        "edm2",
        "denoising-diffusion-pytorch",
        "karras_unet: Linear, Gain, MPSiLU",
        (got, weight, gain[0]),
        (want, *other),
        x=x,
        c=c,
    )


def test_ada_group_norm_without_a_scale_is_the_default_of_diffusers_residual_block(parity, peer):
    theirs = peer("diffusers.models.resnet").ResnetBlock2D(
        in_channels=16, temb_channels=8, groups=4, eps=1e-5, time_embedding_norm="default"
    )
    stirred(theirs).to(DTYPE)
    ours = create(
        "ada_group_norm(groups=4, use_scale_shift_norm=False)",
        features=16,
        condition_dim=8,
        channel_dim=1,
    ).to(DTYPE)
    ours.proj.load_state_dict(theirs.time_emb_proj.state_dict())
    ours.norm.load_state_dict(theirs.norm2.state_dict())
    x, c = inputs((2, 16, 5, 6), (2, 8))
    h = ours(theirs.conv1(silu(theirs.norm1(x))), c)
    got = x + theirs.conv2(silu(h))
    what = "ResnetBlock2D(time_embedding_norm='default')"
    parity("ada_group_norm", "diffusers", what, got, theirs(x, c), x=x, c=c)
