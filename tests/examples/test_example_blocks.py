"""The blocks in examples/blocks run, and compute what the published blocks do."""

import importlib
import importlib.util
import runpy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import condmod
from condmod import CodecError, Signal, convert
from condmod.codec import linear

FOLDER = Path(__file__).parents[2] / "examples" / "blocks"
NAMES = ("adm", "audio2photoreal", "dit", "mmdit", "pixart")
C, HEADS, T, S = 8, 4, 6, 5  # channels, attention heads, positions, tokens
PRINTED = {
    "adm": (
        "(2, 64, 16, 16) to (2, 96, 16, 16)",
        "(2, 64, 16, 16) to (2, 64, 8, 8)",
        "y is x: True",
    ),
    "audio2photoreal": ("condition (2, 60, 64): (2, 60, 64)", "67 published keys, there and back"),
    "dit": ("time (2, 16), condition (2, 16, 64): (2, 16, 64)", "y is x: True"),
    "mmdit": ("image (2, 16, 64), text (2, 5, 64)", "20 keys, as x_block.adaLN_modulation.1"),
    "pixart": ("(2, 16, 64)", "one trunk of 24,960 parameters, and 384 for each block"),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def block_of(name):
    """A block's file as a module."""
    spec = importlib.util.spec_from_file_location(f"example_block_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer(name):
    """A module of diffusers, whose import may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"diffusers.models.{name}")


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def stirred(module):
    """The same module in float64, with no parameter that is 0 or 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def under(name, module):
    """A module's state dict with a name before every key."""
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}


def joined(name, *linears):
    """Linears as one, their rows in turn."""
    states = [module.state_dict() for module in linears]
    return {f"{name}.{leaf}": torch.cat([s[leaf] for s in states]) for leaf in ("weight", "bias")}


def attention(name, theirs):
    """diffusers' self-attention with the in-projections in one."""
    qkv = joined(f"{name}.qkv", theirs.to_q, theirs.to_k, theirs.to_v)
    return qkv | under(f"{name}.proj", theirs.to_out[0])


def feed_forward(name, theirs):
    return under(f"{name}.fc1", theirs.net[0].proj) | under(f"{name}.fc2", theirs.net[2])


def load(ours, source, theirs):
    """Ours in float64 with the published parameters, whose keys come back."""
    ours = ours.double().eval()
    ours.load_state_dict(convert(ours, source, theirs))
    back = convert(ours, source, ours.state_dict(), inverse=True)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.items())
    return ours


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_runs_as_a_program_and_says_what_it_shows(name, capsys):
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for words in PRINTED[name]:
        assert words in printed


def test_every_block_is_here_and_takes_fewer_than_120_lines():
    files = sorted(FOLDER.glob("*.py"))
    assert tuple(file.stem for file in files) == NAMES
    for file in files:
        assert len(file.read_text(encoding="utf-8").splitlines()) < 120, file.name


def test_the_dit_block_is_the_block_of_diffusers():
    theirs = peer("attention").BasicTransformerBlock(
        C,
        HEADS,
        C // HEADS,
        num_embeds_ada_norm=10,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    theirs = stirred(theirs).eval()
    published = {
        **under("adaLN_modulation.1", theirs.norm1.linear),
        **attention("attn", theirs.attn1),
        **feed_forward("mlp", theirs.ff),
    }
    ours = load(block_of("dit").Block(C, HEADS), "dit", published)
    x, time, label = drawn(2, T, C), torch.tensor([3, 950]), torch.tensor([1, 7])
    c = theirs.norm1.emb(time, label, hidden_dtype=torch.float64)
    assert_same(ours(x, c), theirs(x, timestep=time, class_labels=label))
    assert_same(ours(x, c[:, None].expand(2, T, C)), ours(x, c))


@pytest.mark.parametrize(
    "options", [{}, {"out_features": 12}, {"resize": "down"}, {"resize": "up"}], ids=str
)
def test_the_adm_block_is_the_residual_block_of_diffusers(options):
    theirs = peer("resnet").ResnetBlock2D(
        in_channels=C,
        out_channels=options.get("out_features"),
        temb_channels=6,
        groups=4,
        eps=1e-5,
        time_embedding_norm="scale_shift",
        up=options.get("resize") == "up",
        down=options.get("resize") == "down",
    )
    theirs = stirred(theirs).eval()
    published = {
        **under("in_layers.0", theirs.norm1),
        **under("in_layers.2", theirs.conv1),
        **under("emb_layers.1", theirs.time_emb_proj),
        **under("out_layers.0", theirs.norm2),
        **under("out_layers.3", theirs.conv2),
        **(under("skip_connection", theirs.conv_shortcut) if theirs.conv_shortcut else {}),
    }
    ours = load(block_of("adm").Block(C, 6, groups=4, **options), "adm", published)
    x, c = drawn(2, C, 6, 4), drawn(2, 6)
    assert_same(ours(x, c), theirs(x, c))


def test_the_mmdit_block_is_the_joint_block_of_diffusers():
    theirs = stirred(peer("attention").JointTransformerBlock(C, HEADS, C // HEADS)).eval()
    both = theirs.attn
    qkv = joined("context_block.attn.qkv", both.add_q_proj, both.add_k_proj, both.add_v_proj)
    published = {
        **under("x_block.adaLN_modulation.1", theirs.norm1.linear),
        **attention("x_block.attn", both),
        **feed_forward("x_block.mlp", theirs.ff),
        **under("context_block.adaLN_modulation.1", theirs.norm1_context.linear),
        **qkv,
        **under("context_block.attn.proj", both.to_add_out),
        **feed_forward("context_block.mlp", theirs.ff_context),
    }
    ours = load(block_of("mmdit").Block(C, HEADS), "sd3", published)
    image, text, c = drawn(2, T, C), drawn(2, S, C), drawn(2, C)
    want_text, want = theirs(image, text, c)
    got, got_text = ours(image, text, c)
    assert_same(got, want)
    assert_same(got_text, want_text)


def test_the_pixart_blocks_are_those_of_diffusers_under_a_mask_of_the_text():
    trunk = stirred(peer("normalization").AdaLayerNormSingle(C))
    theirs = [
        stirred(
            peer("attention").BasicTransformerBlock(
                C,
                HEADS,
                C // HEADS,
                cross_attention_dim=C,
                attention_bias=True,
                activation_fn="gelu-approximate",
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                norm_eps=1e-6,
            )
        ).eval()
        for _ in range(2)
    ]
    published = under("t_block.1", trunk.linear)
    for i, block in enumerate(theirs):
        cross = block.attn2
        published |= {
            f"blocks.{i}.scale_shift_table": block.scale_shift_table.detach(),
            **attention(f"blocks.{i}.attn", block.attn1),
            **under(f"blocks.{i}.cross_attn.q_linear", cross.to_q),
            **joined(f"blocks.{i}.cross_attn.kv_linear", cross.to_k, cross.to_v),
            **under(f"blocks.{i}.cross_attn.proj", cross.to_out[0]),
            **feed_forward(f"blocks.{i}.mlp", block.ff),
        }
    ours = load(block_of("pixart").Blocks(C, HEADS, 2), "pixart", published)
    x, text, mask = drawn(2, T, C), drawn(2, S, C), torch.arange(S) < torch.tensor([[S], [2]])
    rows, c = trunk(torch.tensor([3, 950]), hidden_dtype=torch.float64)
    bias = torch.zeros(2, 1, S, dtype=torch.float64).masked_fill(~mask[:, None], -torch.inf)
    want = x
    for block in theirs:
        want = block(want, encoder_hidden_states=text, encoder_attention_mask=bias, timestep=rows)
    assert_same(ours(x, c, Signal(text, mask)), want)
    assert not torch.allclose(ours(x, c, text), want)


def test_blocks_start_as_published():
    x, c, text = torch.randn(2, T, C), torch.randn(2, C), torch.randn(2, S, C)
    dit = block_of("dit").Block(C, HEADS)
    assert torch.equal(dit(x, c), x)
    bound = (6 / (C + 3 * C)) ** 0.5  # of Xavier's uniform distribution
    assert 0.9 * bound < dit.attn.qkv.weight.abs().max() <= bound
    assert not dit.mlp.fc1.bias.any()
    adm = block_of("adm").Block(C, 6, 12, groups=4)
    picture = torch.randn(2, C, 4, 4)
    assert torch.equal(adm(picture, torch.randn(2, 6)), adm.skip_connection(picture))
    pixart = block_of("pixart").Blocks(C, HEADS, 2)
    assert torch.equal(pixart(x, c, text), pixart(x, c, text.flip(0)))
    assert not torch.equal(pixart(x, c, text), x)
    assert not pixart.blocks[0].mlp["fc1"].bias.any()
    film = block_of("audio2photoreal").Decoder(64, layers=1).seqTransDecoder["stack"][0].film1
    assert not film.proj.bias.any()
    assert film.proj.weight.std().item() == pytest.approx((2 / (64 + 128)) ** 0.5, rel=0.05)


# Audio2Photoreal's decoder: there is no peer on PyPI, so a naive one in float64.


def published(layers, memories):
    """Keys and shapes of a checkpoint."""
    a2p = block_of("audio2photoreal")
    attentions = ("self_attn", "multihead_attn", "multihead_attn2")[: 1 + memories]
    places = ("1", "2", "3", "2a")[: 2 + memories]
    layer = {"rotary.freqs": (C // 2,)}
    for name in attentions:
        layer |= {f"{name}.in_proj_weight": (3 * C, C), f"{name}.in_proj_bias": (3 * C,)}
        layer |= {f"{name}.out_proj.weight": (C, C), f"{name}.out_proj.bias": (C,)}
    for place in places:
        layer |= {f"norm{place}.weight": (C,), f"norm{place}.bias": (C,)}
        layer |= {f"film{place}.block.1.weight": (2 * C, C), f"film{place}.block.1.bias": (2 * C,)}
    layer |= {"linear1.weight": (a2p.HIDDEN, C), "linear1.bias": (a2p.HIDDEN,)}
    layer |= {"linear2.weight": (C, a2p.HIDDEN), "linear2.bias": (C,)}
    stack = {
        f"seqTransDecoder.stack.{i}.{key}": shape
        for i in range(layers)
        for key, shape in layer.items()
    }
    freqs = 1e4 ** (-torch.arange(0, C, 2).double() / C)
    return {
        key: freqs if key.endswith("freqs") else drawn(*shape) / C**0.5
        for key, shape in (stack | {"rotary.freqs": (C // 2,)}).items()
    }


def decoder(theirs, memories, **options):
    a2p = block_of("audio2photoreal")
    ours = a2p.Decoder(C, layers=2, memories=memories, **options)
    return load(ours, "audio2photoreal", theirs)


def turned(x, freqs):
    """Pairs of neighbouring channels as complex numbers, turned by position times frequency."""
    angles = torch.arange(x.shape[1])[:, None] * freqs
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)


def attended(p, name, queries, tokens, hidden):
    """Attention, a head at a time; `hidden` (B, T or 1, S) is True where a token is not seen."""
    w, b = p[f"{name}.in_proj_weight"].chunk(3), p[f"{name}.in_proj_bias"].chunk(3)
    q = F.linear(turned(queries, p["rotary.freqs"]), w[0], b[0])
    k = F.linear(turned(tokens, p["rotary.freqs"]), w[1], b[1])
    v = F.linear(tokens, w[2], b[2])
    heads = []
    for head in range(HEADS):
        own = slice(head * C // HEADS, (head + 1) * C // HEADS)
        scores = q[..., own] @ k[..., own].transpose(1, 2) / (C // HEADS) ** 0.5
        heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[..., own])
    return F.linear(torch.cat(heads, -1), p[f"{name}.out_proj.weight"], p[f"{name}.out_proj.bias"])


def reference(p, x, c, memories, hidden, norm_first):
    """One layer; `hidden` for self-attention and for each memory."""
    sublayers = {"1": lambda h: attended(p, "self_attn", h, h, hidden[0])}
    for place, name, memory, mask in zip(
        ("2", "2a"), ("multihead_attn", "multihead_attn2"), memories, hidden[1:], strict=False
    ):
        sublayers[place] = lambda h, n=name, m=memory, k=mask: attended(p, n, h, m, k)
    sublayers["3"] = lambda h: F.linear(
        F.gelu(F.linear(h, p["linear1.weight"], p["linear1.bias"])),
        p["linear2.weight"],
        p["linear2.bias"],
    )
    rows = c[:, None] if c.ndim == 2 else c
    for place, sublayer in sublayers.items():
        norm = (p[f"norm{place}.weight"], p[f"norm{place}.bias"], 1e-5)
        film = F.linear(
            F.mish(rows), p[f"film{place}.block.1.weight"], p[f"film{place}.block.1.bias"]
        )
        scale, shift = film.chunk(2, -1)
        y = sublayer(F.layer_norm(x, (C,), *norm) if norm_first else x)
        x = x + (1 + scale) * y + shift
        x = x if norm_first else F.layer_norm(x, (C,), *norm)
    return x


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("memories", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_decoder_is_the_published_formula(norm_first, memories, causal, aligned):
    theirs = published(2, memories)
    ours = decoder(theirs, memories, norm_first=norm_first)
    x, c = drawn(2, T, C), drawn(2, T, C) if aligned else drawn(2, C)
    tokens = [drawn(2, S + i, C) for i in range(memories)]
    real = [torch.arange(T) < torch.tensor([[T], [4]]), torch.rand(2, S) < 0.7]
    real[1][:, 0] = True
    hidden = [~mask[:, None] for mask in real] + [torch.zeros(1, 1, 1, dtype=torch.bool)]
    if causal:
        hidden[0] = hidden[0] | torch.ones(T, T, dtype=torch.bool).triu(1)
    want = x
    for i in range(2):
        prefix = f"seqTransDecoder.stack.{i}."
        own = {k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)}
        want = reference(own, want, c, tokens, hidden, norm_first)
    got = ours(x, c, Signal(tokens[0], real[1]), *tokens[1:], mask=real[0], causal=causal)
    assert_same(got, want)


def test_one_condition_is_the_same_one_at_every_frame():
    ours = decoder(published(2, 1), 1)
    x, c, audio = drawn(2, T, C), drawn(2, C), drawn(2, S, C)
    assert_same(ours(x, c[:, None].expand(2, T, C), audio), ours(x, c, audio))


@pytest.mark.parametrize("norm_first", [True, False])
def test_causal_frames_do_not_see_what_comes(norm_first):
    ours = decoder(published(2, 1), 1, norm_first=norm_first)
    x, c, audio = drawn(2, T, C), drawn(2, T, C), drawn(2, S, C)
    other, other_c = x.clone(), c.clone()
    other[:, 4:], other_c[:, 4:] = drawn(2, 2, C), drawn(2, 2, C)
    before = ours(x, c, audio, causal=True)
    after = ours(other, other_c, audio, causal=True)
    assert_same(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])
    free, other_free = ours(x, c, audio), ours(other, other_c, audio)
    assert not torch.allclose(free[:, :4], other_free[:, :4])


def test_a_second_memory_is_read_and_its_number_is_checked():
    ours = decoder(published(2, 2), 2)
    x, c, audio, keyframes = drawn(2, T, C), drawn(2, C), drawn(2, S, C), drawn(2, 3, C)
    before = ours(x, c, audio, keyframes)
    assert not torch.allclose(ours(x, c, audio, drawn(2, 3, C)), before)
    assert not torch.allclose(ours(x, c, drawn(2, S, C), keyframes), before)
    with pytest.raises(ValueError, match="shorter"):
        ours(x, c, audio)
    with pytest.raises(ValueError, match="longer"):
        ours(x, c, audio, keyframes, keyframes)


def test_a_memory_that_is_hidden_adds_no_more_than_a_constant():
    ours = decoder(published(2, 1), 1)
    x, c, mask = drawn(2, T, C), drawn(2, C), torch.tensor([[True] * S, [False] * S])
    one, other = (ours(x, c, Signal(drawn(2, S, C), mask)) for _ in range(2))
    assert one.isfinite().all()
    assert_same(one[1], other[1])
    assert not torch.allclose(one[0], other[0])


def test_rotary_depends_on_the_distance_and_starts_at_ten_thousand():
    rotary = block_of("audio2photoreal").Rotary(C)
    torch.testing.assert_close(rotary.freqs, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert [*rotary.state_dict()] == ["freqs"]
    rotary = rotary.double()
    q, k = (drawn(1, 1, C).expand(1, 9, C) for _ in range(2))
    scores = rotary(q)[0] @ rotary(k)[0].T
    assert_same(scores[:-1, :-1], scores[1:, 1:])
    assert not torch.allclose(scores[0, 0], scores[0, 3])
    assert rotary(q.bfloat16()).dtype == torch.bfloat16


def test_values_are_not_turned():
    a2p = block_of("audio2photoreal")
    layer = a2p.DecoderLayer(C, a2p.Rotary(C)).double().eval()
    state = layer.multihead_attn.state_dict()
    state["in_proj_weight"][: 2 * C] = 0  # every token counts alike, wherever it stands
    seen = layer._attend("2", drawn(2, T, C), tokens := drawn(2, S, C), causal=False)
    values = F.linear(tokens, state["in_proj_weight"][2 * C :], state["in_proj_bias"][2 * C :])
    want = layer.multihead_attn.out_proj(values.mean(1, keepdim=True))
    assert_same(seen, want.expand(2, T, C))


def test_what_is_dropped_is_dropped_before_the_film():
    a2p = block_of("audio2photoreal")
    layer = a2p.DecoderLayer(C, a2p.Rotary(C)).double().train()
    layer.dropout = nn.Dropout(1.0)
    x, c, audio = drawn(2, T, C), drawn(2, C), drawn(2, S, C)
    films = (layer.film1, layer.film2, layer.film3)
    shifts = torch.stack([film.generate(c).shift for film in films]).sum(0)
    assert_same(layer(x, c, audio), x + shifts[:, None])


def test_training_drops_and_reaches_every_parameter():
    ours = block_of("audio2photoreal").Decoder(C, layers=1, memories=2).train()
    x, c, audio, keyframes = (torch.randn(2, *s) for s in ((T, C), (C,), (S, C), (3, C)))
    y = ours(x, c, audio, keyframes)
    assert not torch.equal(ours(x, c, audio, keyframes), y)
    y.square().sum().backward()
    assert all(parameter.grad.any() for parameter in ours.parameters())


@pytest.mark.parametrize("memories", [1, 2])
def test_a_checkpoint_has_the_published_keys_and_no_other(memories):
    theirs = published(2, memories)
    ours = decoder(theirs, memories)
    back = convert(ours, "audio2photoreal", ours.state_dict(), inverse=True)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in theirs.items()}
    assert len([key for key in back if key.endswith("rotary.freqs")]) == 3
    del theirs["seqTransDecoder.stack.1.film2.block.1.bias"]
    theirs["seqTransDecoder.stack.2.norm1.bias"] = torch.zeros(C)
    del theirs["rotary.freqs"]
    with pytest.raises(CodecError) as caught:
        convert(ours, "audio2photoreal", theirs)
    assert str(caught.value) == (
        "Decoder: these are not its parameters as audio2photoreal has them; missing: rotary.freqs, "
        "seqTransDecoder.stack.1.film2.block.1.bias; unknown: seqTransDecoder.stack.2.norm1.bias"
    )


def test_the_shared_frequencies_are_the_same_everywhere():
    theirs = published(2, 1)
    ours = decoder(theirs, 1)
    theirs["seqTransDecoder.stack.1.rotary.freqs"] = torch.ones(C // 2).double()
    with pytest.raises(CodecError) as caught:
        convert(ours, "audio2photoreal", theirs)
    assert str(caught.value) == (
        "Decoder: rotary.freqs and seqTransDecoder.stack.1.rotary.freqs are one tensor here; got "
        "two that differ"
    )


class Swapped(condmod.Registry):
    """Reads scale where shift is, and the other way round."""

    def codecs(self, name):
        swapped = linear({"proj": ("scale", "shift")}, {"block.1": ("shift", "scale")})
        return [replace(codec, layout=lambda _: swapped) for codec in super().codecs(name)]


def test_a_swap_of_scale_and_shift_would_be_seen():
    theirs = published(2, 1)
    ours = decoder(theirs, 1)
    x, c, audio = drawn(2, T, C), drawn(2, C), drawn(2, S, C)
    want = ours(x, c, audio)
    ours.load_state_dict(convert(ours, "audio2photoreal", theirs, registry=Swapped()))
    assert (ours(x, c, audio) - want).abs().max() > 1e-2


def test_a_layer_alone_converts_by_the_keys_behind_its_number():
    a2p = block_of("audio2photoreal")
    layer = a2p.DecoderLayer(C, a2p.Rotary(C)).double()
    prefix = "seqTransDecoder.stack.0."
    own = {k.removeprefix(prefix): v for k, v in published(1, 1).items() if k.startswith(prefix)}
    layer.load_state_dict(convert(layer, "audio2photoreal", own))
    assert torch.equal(layer.film3.proj.weight, own["film3.block.1.weight"])
    assert isinstance(layer.norm1, nn.LayerNorm)
