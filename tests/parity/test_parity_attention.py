"""Attention to tokens equals the packages that people use, under equal weights."""

import pytest
import torch

from condmod import Signal, convert, create

MASK = torch.tensor([[True, False, True, True, False], [True, True, False, False, False]])


def tokens(mask=None):
    value = torch.randn(2, 5, 6).double()
    return value if mask is None else Signal(value, mask=mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_cross_attention_is_that_of_diffusers(parity, peer, bias, masked):
    module = peer("diffusers.models.attention_processor")
    theirs = module.Attention(
        8, 6, heads=2, dim_head=3, bias=bias, residual_connection=True
    ).double()
    spec = f"cross_attention(heads=2, head_dim=3, norm='none', bias={bias})"
    ours = create(spec, features=8, condition_dim=6).double()
    ours.load_state_dict(convert(ours, "diffusers", theirs.state_dict()))
    x, c = torch.randn(2, 7, 8).double(), tokens(MASK if masked else None)
    value = c.value if masked else c
    mask = {"attention_mask": bias_of(MASK)} if masked else {}
    what = f"Attention(bias={bias}), {'masked' if masked else 'no mask'}"
    want = theirs(x, encoder_hidden_states=value, **mask)
    parity("cross_attention", "diffusers", what, ours(x, c), want, x=x, tokens=value)


def test_cross_attention_is_that_of_diffusers_on_pictures(parity, peer):
    module = peer("diffusers.models.attention_processor")
    theirs = module.Attention(8, 6, heads=2, dim_head=4, residual_connection=True).double()
    spec = "cross_attention(heads=2, norm='none')"
    ours = create(spec, features=8, condition_dim=6, channel_dim=1).double()
    ours.load_state_dict(convert(ours, "diffusers", theirs.state_dict()))
    x, c = torch.randn(2, 8, 3, 4).double(), tokens()
    want = theirs(x, encoder_hidden_states=c)
    parity("cross_attention", "diffusers", "Attention of (B, C, H, W)", ours(x, c), want, x=x, c=c)


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_is_torch_s_multihead_attention(parity, masked):
    theirs = torch.nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True).double()
    torch.nn.init.normal_(theirs.in_proj_bias)
    spec = "cross_attention(heads=2, norm='none', bias=True, residual=False)"
    ours = create(spec, features=8, condition_dim=6).double()
    state = theirs.state_dict()
    biases = dict(zip(("query", "key", "value"), state["in_proj_bias"].chunk(3), strict=True))
    ours.load_state_dict(
        {f"{name}.weight": state[f"{name[0]}_proj_weight"] for name in biases}
        | {f"{name}.bias": bias for name, bias in biases.items()}
        | {f"out.{leaf}": state[f"out_proj.{leaf}"] for leaf in ("weight", "bias")}
    )
    x, c = torch.randn(2, 7, 8).double(), tokens(MASK if masked else None)
    value = c.value if masked else c
    want, _ = theirs(x, value, value, key_padding_mask=~MASK if masked else None)
    what = f"nn.MultiheadAttention(kdim, vdim), {'masked' if masked else 'no mask'}"
    parity("cross_attention", "torch", what, ours(x, c), want, x=x, tokens=value)


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_with_a_null_is_that_of_x_transformers(parity, peer, masked):
    module = peer("x_transformers.x_transformers")
    theirs = module.Attention(8, dim_head=3, dim_context=6, heads=2, num_mem_kv=1).double()
    spec = "cross_attention(heads=2, head_dim=3, norm='none', null=True, residual=False)"
    ours = create(spec, features=8, condition_dim=6).double()
    with torch.no_grad():
        ours.out.bias.zero_()
        ours.null_key.copy_(theirs.mem_k[:, 0])
        ours.null_value.copy_(theirs.mem_v[:, 0])
    for name in ("query", "key", "value", "out"):
        layer = getattr(theirs, "to_out" if name == "out" else f"to_{name[0]}")
        getattr(ours, name).load_state_dict(layer.state_dict(), strict=name != "out")
    x, c = torch.randn(2, 7, 8).double(), tokens(MASK if masked else None)
    value = c.value if masked else c
    want = theirs(x, context=value, context_mask=MASK if masked else None)
    what = f"Attention(num_mem_kv=1), {'masked' if masked else 'no mask'}"
    # x-transformers takes the softmax in float32, also of float64
    parity(
        "cross_attention",
        "x-transformers",
        what,
        ours(x, c),
        want,
        tolerance=1e-6,
        x=x,
        tokens=value,
    )


def test_cross_attention_is_that_of_lucidrains_with_one_key_for_all_heads(parity, peer):
    module = peer("classifier_free_guidance_pytorch.classifier_free_guidance_pytorch")
    theirs = module.CrossAttention(6, 8, heads=2, dim_head=3).double()
    attn = theirs.attn
    ours = create("cross_attention(heads=2, head_dim=3, null=True)", features=8, condition_dim=6)
    ours = ours.double()
    key, value = attn.to_kv.weight.chunk(2)
    null_key, null_value = attn.null_kv.expand(2, 2, 3)
    with torch.no_grad():
        torch.nn.init.normal_(attn.norm.weight)
        ours.out.bias.zero_()
        for name, there in {
            "norm.weight": attn.norm.weight,
            "norm.bias": attn.norm.bias,
            "query.weight": attn.to_q.weight,
            "out.weight": attn.to_out.weight,
            "key.weight": key.repeat(2, 1),
            "value.weight": value.repeat(2, 1),
            "null_key": null_key,
            "null_value": null_value,
        }.items():
            ours.get_parameter(name).copy_(there)
    x, mask = torch.randn(2, 7, 8).double(), torch.tensor([[True] * 5, [False] * 5])
    c = tokens(mask)
    got = ours(x, c._replace(value=attn.context_norm(c.value)))
    want = theirs(c.value, x, mask=mask)
    what = "CrossAttention, a sample without tokens"
    peer_name = "classifier-free-guidance-pytorch"
    parity("cross_attention", peer_name, what, got, want, x=x, tokens=c.value)


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("processor", ["IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0"])
def test_decoupled_attention_is_diffusers_ip_adapter(parity, peer, processor, scale):
    module = peer("diffusers.models.attention_processor")
    theirs = module.Attention(8, 6, heads=2, dim_head=4, residual_connection=True).double()
    image = getattr(module, processor)(8, 6, num_tokens=(4,), scale=scale).double()
    theirs.set_processor(image)
    ours = create("decoupled_attention(heads=2, norm='none')", features=8, condition_dim=6)
    ours = ours.double()
    ours.set_scale(scale)
    ours.load_state_dict(convert(ours, "diffusers", theirs.state_dict()))
    x, text, tokens_ip = (torch.randn(2, n, d).double() for n, d in ((7, 8), (5, 6), (4, 6)))
    states = (text, [tokens_ip])
    want = theirs(x, encoder_hidden_states=states, attention_mask=bias_of(MASK))
    got = ours(x, {"text": Signal(text, mask=MASK), "image": tokens_ip})
    what = f"{processor}(scale={scale:g}), text masked"
    parity("decoupled_attention", "diffusers", what, got, want, x=x, text=text, image=tokens_ip)


def test_decoupled_attention_is_diffusers_ip_adapter_on_pictures(parity, peer):
    module = peer("diffusers.models.attention_processor")
    theirs = module.Attention(8, 6, heads=2, dim_head=4, bias=True).double()
    image = module.IPAdapterAttnProcessor2_0(8, 6, num_tokens=(4,), scale=0.5).double()
    theirs.set_processor(image)
    spec = "decoupled_attention(heads=2, norm='none', bias=True, residual=False, scale=0.5)"
    ours = create(spec, features=8, condition_dim=6, channel_dim=1).double()
    ours.load_state_dict(convert(ours, "diffusers", theirs.state_dict()))
    x, text, tokens_ip = (torch.randn(2, *shape).double() for shape in ((8, 3, 4), (5, 6), (4, 6)))
    want = theirs(x, encoder_hidden_states=(text, [tokens_ip]))
    got = ours(x, {"text": text, "image": tokens_ip})
    what = "IPAdapterAttnProcessor2_0 of (B, C, H, W)"
    parity("decoupled_attention", "diffusers", what, got, want, x=x, text=text, image=tokens_ip)


def bias_of(mask):
    """A mask as diffusers takes it, to be added to the scores, (B, 1, S)."""
    return torch.where(mask, 0.0, -torch.inf).double()[:, None]
