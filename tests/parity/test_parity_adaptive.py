"""Adaptive norms, and what stands around sublayers, against the classes that people use."""

from itertools import product

import pytest
import torch

from condmod import Signal, create

DTYPE = torch.float64
# diffusers' RMS norm computes its mean square in float32, its FP32LayerNorm everything
FLOAT32 = 2e-6


def inputs(*shapes):
    torch.manual_seed(1)
    return [torch.randn(shape, dtype=DTYPE) for shape in shapes]


def stirred(module):
    """In float64 and away from any special start."""
    torch.manual_seed(0)
    module.to(DTYPE)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def loaded(ours, **layers):
    """Our component in float64, each of its modules with the parameters of the peer's."""
    ours.to(DTYPE)
    for name, layer in layers.items():
        getattr(ours, name).load_state_dict(layer.state_dict())
    return ours


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_adaln_is_diffusers_continuous_norm(parity, peer, norm):
    norms = peer("diffusers.models.normalization")
    what = f"AdaLayerNormContinuous(norm_type='{norm}_norm')"
    tolerance = 1e-12 if norm == "layer" else FLOAT32
    x, c = inputs((2, 5, 16), (2, 8))
    for affine, bias in product([True, False], repeat=2):
        said = {"elementwise_affine": affine, "bias": bias, "norm_type": f"{norm}_norm"}
        theirs = stirred(norms.AdaLayerNormContinuous(16, 8, **said))
        spec = f"adaln(order='scale_shift', norm='{norm}', affine={affine}, bias={bias}, eps=1e-5)"
        ours = loaded(
            create(spec, features=16, condition_dim=8), proj=theirs.linear, norm=theirs.norm
        )
        parity("adaln", "diffusers", what, ours(x, c), theirs(x, c), tolerance=tolerance, x=x, c=c)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_adaln_without_a_shift_is_lumina_s_norm_in_diffusers(parity, peer, norm):
    norms = peer("diffusers.models.normalization")
    theirs = stirred(norms.LuminaLayerNormContinuous(16, 8, norm_type=f"{norm}_norm"))
    ours = loaded(
        create(
            f"adaln(order='scale', norm='{norm}', affine=True, eps=1e-5)",
            features=16,
            condition_dim=8,
        ),
        proj=theirs.linear_1,
        norm=theirs.norm,
    )
    x, c = inputs((2, 5, 16), (2, 8))
    what = f"LuminaLayerNormContinuous(norm_type='{norm}_norm')"
    tolerance = 1e-12 if norm == "layer" else FLOAT32
    parity("adaln", "diffusers", what, ours(x, c), theirs(x, c), tolerance=tolerance, x=x, c=c)


@pytest.mark.parametrize(("chunk_dim", "order"), [(0, "scale_shift"), (1, "shift_scale")])
def test_adaln_is_diffusers_ada_layer_norm_in_both_orders(parity, peer, chunk_dim, order):
    norms = peer("diffusers.models.normalization")
    x, c = inputs((2, 5, 16), (2, 8))
    for affine in (True, False):
        said = {"output_dim": 32, "norm_elementwise_affine": affine, "chunk_dim": chunk_dim}
        theirs = stirred(norms.AdaLayerNorm(8, **said))
        spec = f"adaln(order='{order}', affine={affine}, eps=1e-5)"
        ours = loaded(
            create(spec, features=16, condition_dim=8), proj=theirs.linear, norm=theirs.norm
        )
        if chunk_dim == 0:  # there the condition has no batch
            want = torch.stack([theirs(one, temb=row) for one, row in zip(x, c, strict=True)])
        else:
            want = theirs(x, temb=c)
        what = f"AdaLayerNorm(chunk_dim={chunk_dim})"
        parity("adaln", "diffusers", what, ours(x, c), want, x=x, c=c)


def test_adaln_is_the_last_layer_of_dit(parity, peer):
    final = peer("diffusers.models.transformers.transformer_prx").FinalLayer
    theirs = stirred(final(16, 2, 3))
    ours = loaded(create("adaln", features=16, condition_dim=16), proj=theirs.adaLN_modulation[1])
    x, c = inputs((2, 5, 16), (2, 16))
    got = theirs.linear(ours(x, c))
    parity("adaln", "diffusers", "transformer_prx.FinalLayer", got, theirs(x, c), x=x, c=c)


def test_adaln_without_a_shift_is_the_last_layer_of_z_image(parity, peer):
    final = peer("diffusers.models.transformers.transformer_z_image").FinalLayer
    theirs = stirred(final(16, 3))
    ours = loaded(
        create("adaln(order='scale')", features=16, condition_dim=16),
        proj=theirs.adaLN_modulation[1],
    )
    x, c = inputs((2, 5, 16), (2, 16))
    got = theirs.linear(ours(x, c))
    parity("adaln", "diffusers", "transformer_z_image.FinalLayer", got, theirs(x, c), x=x, c=c)


def test_adaln_of_rms_is_the_last_layer_of_vibevoice(parity, peer):
    configs = peer("transformers.models.vibevoice.configuration_vibevoice")
    heads = peer("transformers.models.vibevoice.modeling_vibevoice")
    small = configs.VibeVoiceDiffusionHeadConfig(hidden_size=16)
    theirs = stirred(heads.VibeVoiceDiffusionHeadFinalLayer(small, output_size=3))
    ours = loaded(
        create("adaln(norm='rms', bias=False, eps=1e-5)", features=16, condition_dim=16),
        proj=theirs.linear_1,
    )
    x, c = inputs((2, 16), (2, 16))
    got = theirs.linear_2(ours(x, c))
    parity("adaln", "transformers", "VibeVoiceDiffusionHeadFinalLayer", got, theirs(x, c), x=x, c=c)


def test_ada_rms_norm_is_that_of_x_transformers(parity, peer):
    theirs = stirred(peer("x_transformers.x_transformers").AdaptiveRMSNorm(16, dim_condition=8))
    ours = loaded(
        create("ada_rms_norm(eps=1e-24)", features=16, condition_dim=8), proj=theirs.to_gamma
    )
    for shape in ((2, 8), (2, 5, 8)):
        x, c = inputs((2, 5, 16), shape)
        want = theirs(x, condition=c)
        parity("ada_rms_norm", "x-transformers", "AdaptiveRMSNorm", ours(x, c), want, x=x, c=c)


def test_ada_rms_norm_of_a_layer_norm_is_that_of_x_transformers(parity, peer):
    theirs = stirred(peer("x_transformers.x_transformers").AdaptiveLayerNorm(16, dim_condition=8))
    ours = loaded(
        create("ada_rms_norm(norm='layer', eps=1e-5)", features=16, condition_dim=8),
        proj=theirs.to_gamma,
    )
    x, c = inputs((2, 5, 16), (2, 8))
    want = theirs(x, condition=c)
    parity("ada_rms_norm", "x-transformers", "AdaptiveLayerNorm", ours(x, c), want, x=x, c=c)


def test_ada_rms_norm_is_that_of_k_diffusion(parity, peer):
    theirs = stirred(peer("k_diffusion.models.image_transformer_v1").AdaRMSNorm(16, 8))
    ours = loaded(create("ada_rms_norm", features=16, condition_dim=8), proj=theirs.linear)
    x, c = inputs((2, 5, 16), (2, 8))
    want = theirs(x, c[:, None])
    parity("ada_rms_norm", "k-diffusion", "AdaRMSNorm", ours(x, c), want, x=x, c=c)


def test_hunyuan_shift_is_that_of_diffusers(parity, peer):
    hunyuan = peer("diffusers.models.transformers.hunyuan_transformer_2d")
    theirs = stirred(hunyuan.AdaLayerNormShift(16))
    ours = loaded(
        create("hunyuan_shift", features=16, condition_dim=16),
        proj=theirs.linear,
        norm=theirs.norm,
    )
    x, c = inputs((2, 5, 16), (2, 16))
    got, want = ours(x, c), theirs(x, c)
    parity(
        "hunyuan_shift", "diffusers", "AdaLayerNormShift", got, want, tolerance=FLOAT32, x=x, c=c
    )


@pytest.mark.parametrize("act", [None, "relu", "gelu", "silu", "mish"])
def test_ada_group_norm_diffusers_is_that_of_diffusers(parity, peer, act):
    norms = peer("diffusers.models.normalization")
    theirs = stirred(norms.AdaGroupNorm(8, 16, num_groups=4, act_fn=act))
    ours = loaded(
        create(
            f"ada_group_norm_diffusers(groups=4, activation='{act or 'none'}')",
            features=16,
            condition_dim=8,
            channel_dim=1,
        ),
        proj=theirs.linear,
    )
    x, c = inputs((2, 16, 5, 6), (2, 8))
    what = f"AdaGroupNorm(act_fn={act!r})"
    parity("ada_group_norm_diffusers", "diffusers", what, ours(x, c), theirs(x, c), x=x, c=c)


def test_ada_group_norm_k_diffusion_is_that_of_k_diffusion_at_any_rank(parity, peer):
    layers = peer("k_diffusion.layers")
    theirs = stirred(layers.AdaGN(8, 16, num_groups=16 // 4))
    ours = loaded(
        create(
            "ada_group_norm_k_diffusion(group_size=4)",
            features=16,
            condition_dim=8,
            channel_dim=1,
        ),
        proj=theirs.mapper,
    )
    for positions in ((7,), (5, 6), (2, 3, 4)):
        x, c = inputs((2, 16, *positions), (2, 8))
        want = theirs(x, {"cond": c})
        parity("ada_group_norm_k_diffusion", "k-diffusion", "AdaGN", ours(x, c), want, x=x, c=c)


WIDTHS = {"scalar": 4, "label": 3, "noise": 2, "position": 5}
ACE = {
    "scalar": ("W_scale", "W_bias", "embedding_scalar"),
    "label": ("W_scale_labels", "W_bias_labels", "labels"),
    "noise": ("W_scale_2d", "W_bias_2d", "noise"),
    "position": ("W_scale_pos", "W_bias_pos", "embedding_pos"),
}


@pytest.mark.parametrize("names", [[*WIDTHS], ["noise"]])
@pytest.mark.parametrize("kind", ["channels", "affine", "global"])
def test_ace_layer_norm_is_that_of_ace(parity, peer, names, kind):
    layers = peer("fme.core.models.conditional_sfno.layers")
    widths = {name: width for name, width in WIDTHS.items() if name in names}
    sizes = [widths.get(name, 0) for name in WIDTHS]
    theirs = stirred(
        layers.ConditionalLayerNorm(
            16,
            (5, 6),
            layers.ContextConfig(*sizes),
            global_layer_norm=kind == "global",
            elementwise_affine=kind == "affine",
        )
    )
    options = {**widths, "global_norm": kind == "global", "affine": kind == "affine"}
    ours = create({"name": "ace_layer_norm", **options}, features=16, channel_dim=1).to(DTYPE)
    state = {f"norm.{key}": value for key, value in theirs.norm.state_dict().items()}
    for name in widths:
        both = [getattr(theirs, layer) for layer in ACE[name][:2]]
        state[f"proj.{name}.weight"] = torch.cat([layer.weight.flatten(1) for layer in both])
        if both[0].bias is not None:
            state[f"proj.{name}.bias"] = torch.cat([layer.bias for layer in both])
    ours.load_state_dict(state)
    shapes = {"scalar": (2, 4), "label": (2, 3), "noise": (2, 2, 5, 6), "position": (2, 5, 5, 6)}
    x, *values = inputs((2, 16, 5, 6), *(shapes[name] for name in widths))
    given = dict(zip(widths, values, strict=True))
    context = {ACE[name][2]: given.get(name) for name in WIDTHS}
    want = theirs(x, layers.Context(**context))
    what = f"ConditionalLayerNorm, {kind}"
    parity("ace_layer_norm", "fme", what, ours(x, given), want, x=x, **given)


def test_af3_adaln_is_the_condition_wrapper_of_alphafold3_pytorch(parity, peer):
    wrapper = peer("alphafold3_pytorch.alphafold3").ConditionWrapper
    theirs = stirred(wrapper(torch.nn.Tanh(), dim=16, dim_cond=8))
    norm = theirs.adaptive_norm
    ours = loaded(
        create("af3_adaln", features=16, condition_dim=8),
        condition_norm=norm.norm_cond,
        scale=norm.to_gamma[0],
        shift=norm.to_beta,
        gate=theirs.to_adaln_zero_gamma[0],
    )
    x, c = inputs((2, 5, 16), (2, 5, 8))
    want = x + theirs(x, cond=c)  # the residual is the caller's there
    got = ours(x, c, torch.tanh)
    parity("af3_adaln", "alphafold3-pytorch", "ConditionWrapper", got, want, x=x, c=c)


def test_adaptive_layer_scale_is_that_of_x_transformers(parity, peer):
    layer_scale = peer("x_transformers.x_transformers").AdaptiveLayerScale
    theirs = stirred(layer_scale(torch.nn.Tanh(), 16, dim_condition=8))
    ours = loaded(
        create("adaptive_layer_scale", features=16, condition_dim=8), proj=theirs.to_gamma
    )
    for shape in ((2, 8), (2, 5, 8)):
        x, c = inputs((2, 5, 16), shape)
        got, want = ours(x, c, torch.tanh), x + theirs(x, condition=c)
        parity("adaptive_layer_scale", "x-transformers", "AdaptiveLayerScale", got, want, x=x, c=c)


def test_adaptive_layer_scale_is_the_output_gate_of_transfusion_pytorch(parity, peer):
    wrapper = peer("transfusion_pytorch.transfusion").AdaptiveWrapper
    theirs = stirred(wrapper(torch.nn.Tanh(), dim=16, dim_cond=8))
    ours = loaded(
        create("adaptive_layer_scale", features=16, condition_dim=8),
        proj=theirs.to_ada_ln_zero,
    )
    x, c = inputs((2, 5, 16), (2, 8))

    def normed(h):
        scale, shift = theirs.to_film(c)[:, None].chunk(2, dim=-1)
        return torch.tanh(theirs.layernorm(h) * (1 + scale) + shift)

    got, want = ours(x, c, normed), x + theirs(x, cond=c, modality_only=True)
    parity("adaptive_layer_scale", "transfusion-pytorch", "AdaptiveWrapper", got, want, x=x, c=c)


def test_lumina_is_the_block_of_lumina2_in_diffusers(parity, peer):
    block = peer("diffusers.models.transformers.transformer_lumina2").Lumina2TransformerBlock
    theirs = stirred(block(16, 2, 1, multiple_of=8, ffn_dim_multiplier=1.0, norm_eps=1e-5))
    ours = loaded(
        create("lumina", features=16, condition_dim=16),
        proj=theirs.norm1.linear,
        norms=torch.nn.ModuleDict(
            {
                "attention_norm1": theirs.norm1.norm,
                "attention_norm2": theirs.norm2,
                "ffn_norm1": theirs.ffn_norm1,
                "ffn_norm2": theirs.ffn_norm2,
            }
        ),
    )
    x, c = inputs((2, 5, 16), (2, 16))
    bare = {"attention_mask": None, "image_rotary_emb": None}

    def attention(h):
        return theirs.attn(hidden_states=h, encoder_hidden_states=h, **bare)

    got, want = ours(x, c, attention, theirs.feed_forward), theirs(x, temb=c, **bare)
    what = "Lumina2TransformerBlock"
    parity("lumina", "diffusers", what, got, want, tolerance=FLOAT32, x=x, c=c)


def test_lumina_is_the_norm_and_the_gates_of_lumina_in_diffusers(parity, peer):
    norm = peer("diffusers.models.normalization").LuminaRMSNormZero
    theirs = stirred(norm(16, norm_eps=1e-5, norm_elementwise_affine=True))
    ours = create("lumina", features=16, condition_dim=16).to(DTYPE)
    ours.proj.load_state_dict(theirs.linear.state_dict())
    ours.norms.attention_norm1.load_state_dict(theirs.norm.state_dict())
    x, c = inputs((2, 5, 16), (2, 16))
    attention, feed_forward = ours.generate(c)
    got = (
        ours.enter(x, attention, None),
        attention.gate,
        feed_forward.scale,
        feed_forward.gate,
    )
    want = theirs(x, c)
    parity("lumina", "diffusers", "LuminaRMSNormZero", got, want, tolerance=FLOAT32, x=x, c=c)


@pytest.fixture
def z_image(peer):
    block = peer("diffusers.models.transformers.transformer_z_image").ZImageTransformerBlock
    theirs = stirred(block(0, 16, 2, 2, norm_eps=1e-5, qk_norm=True))
    ours = loaded(create("z_image", features=16, condition_dim=16), proj=theirs.adaLN_modulation[0])
    for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        getattr(ours.norms, name).load_state_dict(getattr(theirs, name).state_dict())
    return ours, theirs


def test_z_image_is_the_block_of_diffusers(parity, z_image):
    ours, theirs = z_image
    x, c = inputs((2, 5, 16), (2, 16))
    got = ours(x, c, theirs.attention, theirs.feed_forward)
    want = theirs(x, None, None, c)
    what = "ZImageTransformerBlock"
    parity("z_image", "diffusers", what, got, want, tolerance=FLOAT32, x=x, c=c)


def test_z_image_with_two_rows_is_the_block_of_diffusers_with_a_noise_mask(parity, z_image):
    ours, theirs = z_image
    x, clean, noisy = inputs((2, 5, 16), (2, 16), (2, 16))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 0, 0, 1]])
    rows = Signal(torch.stack([clean, noisy], 1), index=mask)
    got = ours(x, rows, theirs.attention, theirs.feed_forward)
    want = theirs(x, None, None, None, mask, noisy, clean)
    what = "ZImageTransformerBlock(noise_mask)"
    given = {"x": x, "clean": clean, "noisy": noisy}
    parity("z_image", "diffusers", what, got, want, tolerance=FLOAT32, **given)
