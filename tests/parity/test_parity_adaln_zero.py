"""adaLN-Zero against the norms of other packages, around sublayers."""

import torch

from condmod import create

DTYPE = torch.float64


def test_adaln_zero_is_diffusers_ada_layer_norm_zero_around_two_sublayers(parity, peer):
    theirs = peer("diffusers.models.normalization").AdaLayerNormZero(16, num_embeddings=None)
    theirs.to(DTYPE)
    ours = create("adaln_zero", features=16, condition_dim=16).to(DTYPE)
    ours.proj.load_state_dict(theirs.linear.state_dict())  # both [shift, scale, gate] twice
    x, c = torch.randn(2, 5, 16, dtype=DTYPE), torch.randn(2, 16, dtype=DTYPE)
    normed, gate1, shift2, scale2, gate2 = theirs(x, emb=c)
    y = x + gate1[:, None] * normed.sin()
    normed = theirs.norm(y) * (1 + scale2[:, None]) + shift2[:, None]
    want = y + gate2[:, None] * normed.cos()
    got = ours(x, c, torch.sin, torch.cos)
    parity("adaln_zero", "diffusers", "AdaLayerNormZero", got, want, x=x, c=c)


def test_adaln_zero_of_one_part_is_diffusers_ada_layer_norm_zero_single(parity, peer):
    theirs = peer("diffusers.models.normalization").AdaLayerNormZeroSingle(16).to(DTYPE)
    ours = create("adaln_zero(parts=1)", features=16, condition_dim=16).to(DTYPE)
    ours.proj.load_state_dict(theirs.linear.state_dict())
    x, c = torch.randn(2, 5, 16, dtype=DTYPE), torch.randn(2, 16, dtype=DTYPE)
    normed, gate = theirs(x, emb=c)
    want = x + gate[:, None] * normed.sin()
    got = ours(x, c, torch.sin)
    parity("adaln_zero", "diffusers", "AdaLayerNormZeroSingle", got, want, x=x, c=c)


def test_adaln_zero_is_the_norm_of_qwen_omni_around_two_sublayers(parity, peer):
    module = peer("transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")
    theirs = module.Qwen2_5_OmniAdaLayerNormZero(16).to(DTYPE)
    ours = create("adaln_zero", features=16, condition_dim=16).to(DTYPE)
    ours.proj.load_state_dict(theirs.linear.state_dict())
    x, c = torch.randn(2, 5, 16, dtype=DTYPE), torch.randn(2, 16, dtype=DTYPE)
    normed, gate1, shift2, scale2, gate2 = theirs(x, emb=c)
    y = x + gate1[:, None] * normed.sin()
    normed = theirs.norm(y) * (1 + scale2[:, None]) + shift2[:, None]
    want = y + gate2[:, None] * normed.cos()
    got = ours(x, c, torch.sin, torch.cos)
    parity("adaln_zero", "transformers", "Qwen2_5_OmniAdaLayerNormZero", got, want, x=x, c=c)
