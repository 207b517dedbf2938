"""Transformer blocks of the peers, with our modulators around their attention and feed-forward."""

import pytest
import torch

from condmod import Site, create, create_bank

C, T, S = 32, 6, 4  # channels, image positions, text tokens
FLOAT32 = 5e-6  # for peers that compute norms or more in float32, whatever they are given


def features(positions=T, dtype=torch.float64):
    return torch.randn(2, positions, C, dtype=dtype)


def stirred(module):
    """A peer's module whose zeros and ones would hide a mistake, in float64."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.double()


def modulator(spec, condition_dim, **linears):
    """Ours in float64, with Linears of the peer."""
    ours = create(spec, features=C, condition_dim=condition_dim).double()
    for name, linear in linears.items():
        getattr(ours, name).load_state_dict(linear.state_dict())
    return ours


def bank(spec, condition_dim, state, sites=("block",)):
    """A bank in float64 with these parameters."""
    ours = create_bank(spec, {name: Site(C, condition_dim) for name in sites}).double()
    ours.load_state_dict(state)
    return ours


def around(ours, x, modulation, sublayer):
    return ours.exit(x, sublayer(ours.enter(x, modulation, None)), modulation, None)


def two_streams(first, second, attend, x, context, one, other):
    """Both streams enter, attend jointly, and exit."""
    y, y_context = attend(
        hidden_states=first.enter(x, one, None),
        encoder_hidden_states=second.enter(context, other, None),
    )
    return first.exit(x, y, one, None), second.exit(context, y_context, other, None)


def fed_together(ours, feed_forward, x, context, one, other):
    """Both streams enter one feed-forward, text first, and exit."""
    entered = [ours.enter(context, other, None), ours.enter(x, one, None)]
    y_context, y = feed_forward(torch.cat(entered, 1)).split([context.shape[1], x.shape[1]], 1)
    return ours.exit(x, y, one, None), ours.exit(context, y_context, other, None)


def test_mmdit_is_the_norm_of_diffusers(parity, peer):
    norms = peer("diffusers.models.normalization")
    x, c = features(), torch.randn(2, C).double()
    theirs = norms.AdaLayerNormZero(C).double()
    ours = modulator("mmdit", C, proj=theirs.linear)
    attention, feed_forward = ours.generate(c)
    want = theirs(x, emb=c)
    got = (
        ours.enter(x, attention, None),
        attention.gate,
        feed_forward.shift,
        feed_forward.scale,
        feed_forward.gate,
    )
    parity("mmdit", "diffusers", "AdaLayerNormZero", got, want, x=x, c=c)
    single = norms.AdaLayerNormZeroSingle(C).double()
    ours = modulator("flux(parts=1)", C, proj=single.linear)
    (part,) = ours.generate(c)
    got = (ours.enter(x, part, None), part.gate)
    parity("mmdit", "diffusers", "AdaLayerNormZeroSingle", got, single(x, emb=c), x=x, c=c)


def test_mmdit_is_the_block_of_sd3(parity, peer):
    block = peer("diffusers.models.attention").JointTransformerBlock(C, 2, 16).double()
    x, context, c = features(), features(S), torch.randn(2, C).double()
    image = modulator("mmdit", C, proj=block.norm1.linear)
    text = modulator("mmdit", C, proj=block.norm1_context.linear)
    (attention, feed_forward), (attention_t, feed_forward_t) = image.generate(c), text.generate(c)
    y, y_t = two_streams(image, text, block.attn, x, context, attention, attention_t)
    got = (
        around(text, y_t, feed_forward_t, block.ff_context),
        around(image, y, feed_forward, block.ff),
    )
    want = block(x, context, c)
    parity("mmdit", "diffusers", "JointTransformerBlock", got, want, x=x, text=context, c=c)


def test_flux_is_both_blocks_of_flux(parity, peer):
    flux = peer("diffusers.models.transformers.transformer_flux")
    x, context, c = features(), features(S), torch.randn(2, C).double()
    block = flux.FluxTransformerBlock(C, 2, 16).double()
    image = modulator("flux", C, proj=block.norm1.linear)
    text = modulator("flux", C, proj=block.norm1_context.linear)
    (attention, feed_forward), (attention_t, feed_forward_t) = image.generate(c), text.generate(c)
    y, y_t = two_streams(image, text, block.attn, x, context, attention, attention_t)
    got = (
        around(text, y_t, feed_forward_t, block.ff_context),
        around(image, y, feed_forward, block.ff),
    )
    want = block(x, context, c)
    parity("mmdit", "diffusers", "FluxTransformerBlock", got, want, x=x, text=context, c=c)

    single = flux.FluxSingleTransformerBlock(C, 2, 16).double()
    ours = modulator("flux(parts=1)", C, proj=single.norm.linear)

    def attend_and_feed(h):
        mlp = single.act_mlp(single.proj_mlp(h))
        return single.proj_out(torch.cat([single.attn(hidden_states=h), mlp], -1))

    got = ours(torch.cat([context, x], 1), c, attend_and_feed).split([S, T], 1)
    want = single(x, context, c)
    parity("mmdit", "diffusers", "FluxSingleTransformerBlock", got, want, x=x, text=context, c=c)


def test_flux2_is_both_blocks_of_flux2(parity, peer):
    flux2 = peer("diffusers.models.transformers.transformer_flux2")
    x, context, c = features(), features(S), torch.randn(2, C).double()
    for_image, for_text = (flux2.Flux2Modulation(C).double() for _ in range(2))
    sites = ("blocks.0", "blocks.1")
    image, text = (
        bank("flux2", C, {"shared.proj.weight": one.linear.weight}, sites)
        for one in (for_image, for_text)
    )
    got_x, got_t, want_x, want_t = x, context, x, context
    for name in sites:
        block = flux2.Flux2TransformerBlock(C, 2, 16).double()
        (attention, feed_forward), (attention_t, feed_forward_t) = image(c)[name], text(c)[name]
        ours, ours_t = image[name], text[name]
        got_x, got_t = two_streams(ours, ours_t, block.attn, got_x, got_t, attention, attention_t)
        got_x = around(ours, got_x, feed_forward, block.ff)
        got_t = around(ours_t, got_t, feed_forward_t, block.ff_context)
        want_t, want_x = block(want_x, want_t, for_image(c), for_text(c))
    got, want = (got_t, got_x), (want_t, want_x)
    parity("flux2", "diffusers", "Flux2TransformerBlock", got, want, x=x, text=context, c=c)

    shared = flux2.Flux2Modulation(C, mod_param_sets=1).double()
    single = flux2.Flux2SingleTransformerBlock(C, 2, 16).double()
    ours = bank("flux2(parts=1)", C, {"shared.proj.weight": shared.linear.weight})
    got = ours["block"].around(x, ours(c)["block"], single.attn)
    want = single(x, None, shared(c))
    parity("flux2", "diffusers", "Flux2SingleTransformerBlock", got, want, x=x, c=c)


def test_sd35_is_the_block_with_dual_attention(parity, peer):
    theirs = peer("diffusers.models.normalization").SD35AdaLayerNormZeroX(C).double()
    x, context, c = features(), features(S), torch.randn(2, C).double()
    ours = modulator("sd35", C, proj=theirs.linear)
    attention, second, feed_forward = ours.generate(c)
    got = (
        ours.enter(x, attention, None),
        attention.gate,
        feed_forward.shift,
        feed_forward.scale,
        feed_forward.gate,
        ours.enter(x, second, None),
        second.gate,
    )
    parity("sd35", "diffusers", "SD35AdaLayerNormZeroX", got, theirs(x, emb=c), x=x, c=c)

    attend = peer("diffusers.models.attention").JointTransformerBlock
    block = attend(C, 2, 16, use_dual_attention=True).double()
    image = modulator("sd35", C, proj=block.norm1.linear)
    text = modulator("mmdit", C, proj=block.norm1_context.linear)
    attention_t, feed_forward_t = text.generate(c)

    def joint(h):
        y, y_context = block.attn(
            hidden_states=h, encoder_hidden_states=text.enter(context, attention_t, None)
        )
        gone_out.append(text.exit(context, y_context, attention_t, None))
        return y

    gone_out = []
    y = image(x, c, joint, block.attn2, block.ff)
    got = (around(text, gone_out[0], feed_forward_t, block.ff_context), y)
    what = "JointTransformerBlock(use_dual_attention=True)"
    parity("sd35", "diffusers", what, got, block(x, context, c), x=x, text=context, c=c)


def test_cogview3_is_the_block_of_cogview3plus(parity, peer):
    d = 12
    theirs = peer("diffusers.models.normalization").CogView3PlusAdaLayerNormZeroTextImage(d, C)
    x, context, c = features(), features(S), torch.randn(2, d).double()
    theirs = theirs.double()
    ours = modulator("cogview3", d, proj=theirs.linear)
    attention, feed_forward, attention_t, feed_forward_t = ours.generate(c)
    got = []
    streams = ((x, attention, feed_forward), (context, attention_t, feed_forward_t))
    for stream, one, other in streams:
        got += [ours.enter(stream, one, None), one.gate, other.shift, other.scale, other.gate]
    what = "CogView3PlusAdaLayerNormZeroTextImage"
    parity("cogview3", "diffusers", what, got, theirs(x, context, c), x=x, text=context, c=c)

    plus = peer("diffusers.models.transformers.transformer_cogview3plus")
    block = plus.CogView3PlusTransformerBlock(C, 2, 16, d).double()
    ours = modulator("cogview3", d, proj=block.norm1.linear)
    attention, feed_forward, attention_t, feed_forward_t = ours.generate(c)
    got = two_streams(ours, ours, block.attn1, x, context, attention, attention_t)
    got = fed_together(ours, block.ff, *got, feed_forward, feed_forward_t)
    what = "CogView3PlusTransformerBlock"
    parity("cogview3", "diffusers", what, got, block(x, context, c), x=x, text=context, c=c)


def test_cogvideox_is_the_block_of_cogvideox(parity, peer):
    d = 12
    norms = peer("diffusers.models.normalization")
    theirs = stirred(norms.CogVideoXLayerNormZero(d, C))
    x, context, c = features(), features(S), torch.randn(2, d).double()
    ours = modulator("cogvideox", d, proj=theirs.linear, norm=theirs.norm)
    video, text = ours.generate(c)
    got = (
        ours.enter(x, video, None),
        ours.enter(context, text, None),
        video.gate[:, None],
        text.gate[:, None],
    )
    want = theirs(x, context, c)
    parity("cogvideox", "diffusers", "CogVideoXLayerNormZero", got, want, x=x, text=context, c=c)

    blocks = peer("diffusers.models.transformers.cogvideox_transformer_3d")
    block = stirred(blocks.CogVideoXBlock(C, 2, 16, d))
    first, second = (
        modulator("cogvideox", d, proj=one.linear, norm=one.norm)
        for one in (block.norm1, block.norm2)
    )
    got = two_streams(first, first, block.attn1, x, context, *first.generate(c))
    got = fed_together(second, block.ff, *got, *second.generate(c))
    want = block(x, context, c)
    parity("cogvideox", "diffusers", "CogVideoXBlock", got, want, x=x, text=context, c=c)


def test_adaln_single_is_the_blocks_of_pixart(parity, peer):
    norms, attention = (peer(f"diffusers.models.{name}") for name in ("normalization", "attention"))
    trunk = norms.AdaLayerNormSingle(C).double()
    x, context, time = features(), features(S), torch.tensor([3, 950])
    names = ("blocks.0", "blocks.1")
    blocks = [
        attention.BasicTransformerBlock(
            C,
            2,
            16,
            cross_attention_dim=C,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        ).double()
        for _ in names
    ]
    rows, c = trunk(time, hidden_dtype=torch.float64)
    tables = {
        f"modulators.{name.replace('.', '/')}.table": block.scale_shift_table
        for name, block in zip(names, blocks, strict=True)
    }
    trunks = {f"shared.proj.{key}": value for key, value in trunk.linear.state_dict().items()}
    ours = bank("adaln_single", C, {**trunks, **tables}, names)
    got, want = x, x
    for name, block in zip(names, blocks, strict=True):
        one, other = ours(c)[name]
        got = around(ours[name], got, one, block.attn1)
        got = got + block.attn2(got, encoder_hidden_states=context)
        got = around(ours[name], got, other, block.ff)
        want = block(want, encoder_hidden_states=context, timestep=rows)
    what = "AdaLayerNormSingle and BasicTransformerBlock(norm_type='ada_norm_single')"
    parity("adaln_single", "diffusers", what, got, want, x=x, text=context, c=c)


def test_adaln_single_with_rms_norm_is_the_block_of_ltx_video(parity, peer):
    ltx = peer("diffusers.models.transformers.transformer_ltx")
    block = ltx.LTXVideoTransformerBlock(C, 2, 16, C).double()
    trunk = torch.nn.Linear(C, 6 * C).double()
    x, context, c = features(), features(S), features()
    rows = trunk(torch.nn.functional.silu(c))
    state = {f"shared.proj.{key}": value for key, value in trunk.state_dict().items()}
    state["modulators.block.table"] = block.scale_shift_table
    ours = bank("adaln_single(norm='rms')", C, state)
    one, other = ours(c)["block"]
    got = around(ours["block"], x, one, block.attn1)
    got = got + block.attn2(got, encoder_hidden_states=context)
    got = around(ours["block"], got, other, block.ff)
    want = block(x, context, rows)
    what = "LTXVideoTransformerBlock, a time per token"
    given = {"x": x, "text": context, "c": c}
    parity("adaln_single", "diffusers", what, got, want, tolerance=FLOAT32, **given)


@pytest.mark.parametrize("per_token", [False, True])
def test_wan_is_the_block_of_wan(parity, peer, per_token):
    wan = peer("diffusers.models.transformers.transformer_wan")
    block = wan.WanTransformerBlock(C, 2 * C, 2, cross_attn_norm=True)  # casts to float32 itself
    embedder = wan.WanTimeTextImageEmbedding(C, 8, 6 * C, C)
    x, context = features(dtype=torch.float32), features(S, torch.float32)
    time = torch.randint(1000, (2, T) if per_token else (2,))
    c, rows, *_ = embedder(time.flatten(), context, timestep_seq_len=T if per_token else None)
    ours = create_bank("wan", {"block": Site(C, C)})
    trunk = embedder.time_proj.state_dict()
    state = {f"shared.proj.{key}": value for key, value in trunk.items()}
    ours.load_state_dict({**state, "modulators.block.table": block.scale_shift_table})
    one, other = ours(c)["block"]
    got = around(ours["block"], x, one, lambda h: block.attn1(h, None, None, None))
    got = got + block.attn2(block.norm2(got), context, None, None)
    got = around(ours["block"], got, other, block.ffn)
    want = block(x, context, rows.unflatten(-1, (6, -1)), None)
    what = f"WanTransformerBlock, temb of {rows.ndim + 1} dims"
    given = {"x": x, "text": context, "c": c}
    parity("wan", "diffusers", what, got, want, tolerance=FLOAT32, **given)


def test_stable_audio_is_the_block_of_stable_audio_tools(parity, peer):
    d, tools = 12, peer("stable_audio_tools.models.transformer")
    block = tools.TransformerBlock(
        C, 16, cross_attend=True, dim_context=C, global_cond_dim=d, zero_init_branch_outputs=False
    )
    block = stirred(block)
    names = {"attention_norm": block.pre_norm, "feed_forward_norm": block.ff_norm}
    trunk = tools.ContinuousTransformer(C, 0, dim_heads=16, global_cond_dim=d)
    trunk = trunk.global_cond_embedder.double()
    state = {
        **{f"shared.hidden.{key}": value for key, value in trunk[0].state_dict().items()},
        **{f"shared.proj.{key}": value for key, value in trunk[2].state_dict().items()},
        **{f"modulators.block.{name}.weight": norm.gamma for name, norm in names.items()},
        "modulators.block.table": block.to_scale_shift_gate,
    }
    x, context, c = features(), features(S), torch.randn(2, d).double()
    ours = bank("stable_audio", d, state)
    one, other = ours(c)["block"]
    got = around(ours["block"], x, one, block.self_attn)
    got = got + block.cross_attn(block.cross_attend_norm(got), context=context)
    got = around(ours["block"], got, other, block.ff)
    want = block(x, context=context, global_cond=trunk(c))
    what = "TransformerBlock(global_cond_dim=...)"
    parity("stable_audio", "stable-audio-tools", what, got, want, x=x, text=context, c=c)


def test_stable_audio_with_rms_norm_is_the_block_of_stable_audio_3(parity, peer):
    audio = peer("diffusers.models.transformers.transformer_stable_audio3")
    block = audio.StableAudio3DiTBlock(C, C, 16, use_differential=False)
    block = stirred(block)
    trunk = torch.nn.Sequential(
        torch.nn.Linear(C, C), torch.nn.SiLU(), torch.nn.Linear(C, 6 * C)
    ).double()
    state = {
        **{f"shared.hidden.{key}": value for key, value in trunk[0].state_dict().items()},
        **{f"shared.proj.{key}": value for key, value in trunk[2].state_dict().items()},
        "modulators.block.attention_norm.weight": block.pre_norm.gamma,
        "modulators.block.feed_forward_norm.weight": block.ff_norm.gamma,
        "modulators.block.table": block.to_scale_shift_gate,
    }
    x, context, c = features(), features(S), torch.randn(2, C).double()
    rope = audio.StableAudio3RotaryEmbedding(8)(T, x.device)
    ours = bank("stable_audio(norm='rms', eps=1e-6)", C, state)
    one, other = ours(c)["block"]
    got = around(ours["block"], x, one, lambda h: block.self_attn(h, rope=rope))
    got = got + block.cross_attn(block.cross_attend_norm(got), context=context, context_mask=None)
    got = around(ours["block"], got, other, block.ff)
    want = block(x, context, trunk(c), rope)
    what, given = "StableAudio3DiTBlock", {"x": x, "text": context, "c": c}
    parity("stable_audio", "diffusers", what, got, want, tolerance=FLOAT32, **given)


def test_cosmos_is_the_block_of_cosmos(parity, peer):
    rank, cosmos = 5, peer("diffusers.models.transformers.transformer_cosmos")
    block = cosmos.CosmosTransformerBlock(2, 16, C, adaln_lora_dim=rank).double()
    embedding = stirred(cosmos.CosmosEmbedding(C, C))
    x, context, time = features(), features(S), torch.tensor([0.3, 7.0])
    temb, embedded = embedding(x, time)
    c = embedding.time_proj(time).double()
    names = ("norm1", "norm2", "norm3")
    state = {
        "shared.norm.weight": embedding.norm.weight,
        "shared.hidden.weight": embedding.t_embedder.linear_1.weight,
        "shared.proj.weight": embedding.t_embedder.linear_2.weight,
    }
    for name in names:
        norm = getattr(block, name)
        state[f"modulators.{name}.proj.0.weight"] = norm.linear_1.weight
        state[f"modulators.{name}.proj.1.weight"] = norm.linear_2.weight
    ours = bank(f"cosmos(rank={rank})", C, state, names)
    sublayers = (
        block.attn1,
        lambda h: block.attn2(h, encoder_hidden_states=context),
        block.ff,
    )
    got = x
    for name, sublayer in zip(names, sublayers, strict=True):
        (part,) = ours(c)[name]
        got = around(ours[name], got, part, sublayer)
    want = block(x, context, embedded, temb)
    what = "CosmosEmbedding and CosmosTransformerBlock"
    given = {"x": x, "text": context, "c": c}
    parity("cosmos", "diffusers", what, got, want, tolerance=FLOAT32, **given)
