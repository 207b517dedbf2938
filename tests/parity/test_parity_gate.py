"""Gates and side paths against other packages."""

import pytest
import torch
from torch import nn

from condmod import create

DTYPE = torch.float64


def stirred(module):
    """Away from any special start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.to(DTYPE)


def excited(spec, theirs, features, channel_dim):
    ours = create(spec, features=features, channel_dim=channel_dim).to(DTYPE)
    with torch.no_grad():
        for own, other in ((ours.reduce, theirs.fc1), (ours.expand, theirs.fc2)):
            assert own.weight.shape == other.weight.shape[:2]
            own.weight.copy_(other.weight.flatten(1))
            own.bias.copy_(other.bias)
    return ours


def both(x, ours, theirs):
    """Output and the gradient of x, of each."""
    goal = torch.randn_like(x)
    outs = []
    for module in (ours, theirs):
        y = module(x)
        outs.append((y, torch.autograd.grad((y * goal).sum(), x)[0]))
    return outs


@pytest.mark.parametrize("features", [6, 64, 200])
def test_squeeze_excite_is_timms_with_its_own_number_of_hidden_channels(
    parity, timm_layers, features
):
    theirs = stirred(timm_layers("squeeze_excite").SEModule(features))
    x = torch.randn(2, features, 5, 7, dtype=DTYPE, requires_grad=True)
    got, want = both(x, excited("squeeze_excite", theirs, features, 1), theirs)
    parity("squeeze_excite", "timm", "SEModule", got, want, x=x)


def test_squeeze_excite_with_other_options_is_timms(parity, timm_layers):
    theirs = timm_layers("squeeze_excite").SEModule(
        48, rd_ratio=0.25, rd_divisor=1, act_layer=nn.SiLU, gate_layer="hard_sigmoid"
    )
    theirs = stirred(theirs)
    spec = "squeeze_excite(ratio=0.25, divisor=1, activation='silu', gate='hard_sigmoid')"
    x = torch.randn(2, 48, 5, 7, dtype=DTYPE, requires_grad=True)
    got, want = both(x, excited(spec, theirs, 48, 1), theirs)
    what = "SEModule(rd_ratio=0.25, rd_divisor=1, act_layer=SiLU, gate_layer='hard_sigmoid')"
    parity("squeeze_excite", "timm", what, got, want, x=x)


def test_squeeze_excite_of_channels_last_is_timms(parity, timm_layers):
    theirs = stirred(timm_layers("squeeze_excite").SqueezeExciteCl(64))
    x = torch.randn(2, 5, 7, 64, dtype=DTYPE, requires_grad=True)
    got, want = both(x, excited("squeeze_excite", theirs, 64, -1), theirs)
    parity("squeeze_excite", "timm", "SqueezeExciteCl", got, want, x=x)


def gated(spec, features, alpha):
    ours = create(spec, features=features).to(DTYPE)
    with torch.no_grad():
        ours.alpha.copy_(alpha.flatten())
    return ours


def test_two_tanh_gates_are_gligens_gated_self_attention_in_diffusers(parity, peer):
    theirs = stirred(
        peer("diffusers.models.attention").GatedSelfAttentionDense(
            query_dim=16, context_dim=12, n_heads=2, d_head=8
        )
    )
    one, other = (gated("tanh_gate", 16, a) for a in (theirs.alpha_attn, theirs.alpha_dense))
    x = torch.randn(2, 9, 16, dtype=DTYPE)
    objects = torch.randn(2, 3, 12, dtype=DTYPE)

    def attend(h):
        joined = torch.cat([h, theirs.linear(objects)], 1)
        return theirs.attn(theirs.norm1(joined))[:, : h.shape[1]]

    y = other(one(x, None, attend), None, lambda h: theirs.ff(theirs.norm2(h)))
    want = theirs(x, objects)
    parity("tanh_gate", "diffusers", "GatedSelfAttentionDense", y, want, x=x, objects=objects)


@pytest.mark.parametrize("alpha_type", ["float", "vector"])
def test_two_tanh_gates_are_the_gated_cross_attention_of_idefics(parity, peer, alpha_type):
    model = peer("transformers.models.idefics.modeling_idefics")
    config = peer("transformers.models.idefics.configuration_idefics").IdeficsConfig(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        alpha_type=alpha_type,
        vision_config={"embed_dim": 16},
    )
    config._attn_implementation = "eager"
    theirs = stirred(model.IdeficsGatedCrossAttentionLayer(config, layer_idx=0)).eval()
    spec = "tanh_gate(per_channel=True)" if alpha_type == "vector" else "tanh_gate"
    one, other = (gated(spec, 16, a) for a in (theirs.alpha_cross_attn, theirs.alpha_dense))
    x, images = torch.randn(2, 9, 16, dtype=DTYPE), torch.randn(2, 5, 16, dtype=DTYPE)

    def attend(h):
        return theirs.cross_attn(theirs.input_layernorm(h), key_value_states=images)[0]

    y = other(one(x, None, attend), None, lambda h: theirs.mlp(theirs.post_attention_layernorm(h)))
    want = theirs(x, image_hidden_states=images, cross_attention_gate=torch.ones(2, 9))
    what = f"IdeficsGatedCrossAttentionLayer(alpha_type={alpha_type!r})"
    parity("tanh_gate", "transformers", what, y, want, x=x, images=images)


def test_zero_convs_are_those_of_a_controlnet_in_diffusers(parity, peer):
    theirs = peer("diffusers").ControlNetModel(
        in_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        mid_block_type="UNetMidBlock2D",
        norm_num_groups=4,
        conditioning_embedding_out_channels=(8, 8),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    zeros = [*theirs.controlnet_down_blocks, theirs.controlnet_mid_block]
    assert not any(parameter.any() for zero in zeros for parameter in zero.parameters())
    theirs = stirred(theirs)
    read = []
    for zero in zeros:
        zero.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    latents, steps = torch.randn(2, 4, 8, 8, dtype=DTYPE), torch.tensor([3, 40])
    added, middle = theirs(
        latents,
        steps,
        encoder_hidden_states=torch.randn(2, 3, 8, dtype=DTYPE),
        controlnet_cond=torch.randn(2, 3, 16, 16, dtype=DTYPE),
        return_dict=False,
    )
    for zero, control, addition in zip(zeros, read, [*added, middle], strict=True):
        width = control.shape[1]
        ours = create("zero_conv", features=width, condition_dim=width, channel_dim=1).to(DTYPE)
        with torch.no_grad():
            ours.proj.weight.copy_(zero.weight.flatten(1))
            ours.proj.bias.copy_(zero.bias)
        x = torch.randn_like(control)
        want = x + addition  # as UNet2DConditionModel adds its residuals
        parity("zero_conv", "diffusers", "ControlNetModel", ours(x, control), want, x=x, c=control)
