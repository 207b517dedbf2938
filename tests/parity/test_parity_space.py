"""Norms that a map steers, against other packages."""

import torch

from condmod import create

DTYPE = torch.float64


def stirred(module):
    """Away from any special start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def taken_over(spec, norm, scale, shift, **site):
    """Ours with the weights of theirs."""
    ours = create(spec, features=norm.num_channels, **site).to(DTYPE)
    ours.norm.load_state_dict(norm.state_dict())
    layers = (scale, shift)
    with torch.no_grad():
        ours.proj.weight.copy_(torch.cat([layer.weight.flatten(1) for layer in layers]))
        ours.proj.bias.copy_(torch.cat([layer.bias for layer in layers]))
    return ours


def test_spatial_norm_is_diffusers(parity, peer):
    theirs = peer("diffusers.models.attention_processor").SpatialNorm(64, 4)
    theirs = stirred(theirs).to(DTYPE)
    weights = (theirs.norm_layer, theirs.conv_y, theirs.conv_b)
    ours = taken_over("spatial_norm", *weights, condition_dim=4, channel_dim=1)
    x = torch.randn(2, 64, 8, 12, dtype=DTYPE, requires_grad=True)
    for sides in ((3, 5), (8, 12), (16, 10)):
        z = torch.randn(2, 4, *sides, dtype=DTYPE, requires_grad=True)
        got, want = ours(x, z), theirs(x, z)
        goal = torch.randn_like(want)
        own = torch.autograd.grad((got * goal).sum(), [x, z])
        other = torch.autograd.grad((want * goal).sum(), [x, z])
        parity("spatial_norm", "diffusers", "SpatialNorm", (got, *own), (want, *other), x=x, z=z)


def test_spatial_norm_of_a_volume_is_that_of_cogvideox_for_one_frame_and_for_even_ones(
    parity, peer
):
    model = peer("diffusers.models.autoencoders.autoencoder_kl_cogvideox")
    theirs = stirred(model.CogVideoXSpatialNorm3D(64, 4)).to(DTYPE)
    weights = (theirs.norm_layer, theirs.conv_y.conv, theirs.conv_b.conv)
    ours = taken_over("spatial_norm", *weights, condition_dim=4, channel_dim=1)
    for frames, held in ((1, 1), (4, 2)):
        x = torch.randn(2, 64, frames, 6, 8, dtype=DTYPE)
        z = torch.randn(2, 4, held, 3, 4, dtype=DTYPE)
        want, _ = theirs(x, z)
        parity("spatial_norm", "diffusers", "CogVideoXSpatialNorm3D", ours(x, z), want, x=x, z=z)
