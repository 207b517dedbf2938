"""The attention family: one set of tokens, two, and the encoder of tokens."""

import math

import pytest
import torch
from torch import nn

import condmod
from condmod import ConditionError, ShapeError, Signal, SiteError, SpecError


def create(spec, features=8, condition_dim=6, seed=0, **place):
    torch.manual_seed(seed)
    return condmod.create(spec, features=features, condition_dim=condition_dim, **place)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[True, False, True, True], [True, True, False, False]])
CROSS = [
    "cross_attention(heads=2)",
    "cross_attention(heads=2, head_dim=3, norm='none', bias=True, null=True)",
]

# --- cross_attention --------------------------------------------------------------------------


@pytest.mark.parametrize("spec", CROSS)
def test_the_order_of_the_tokens_does_not_matter(spec):
    module = create(spec).double()
    x, c, order = draw(2, 5, 8).double(), draw(2, 4, 6).double(), torch.tensor([2, 0, 3, 1])
    want = module(x, Signal(c, mask=MASK))
    got = module(x, Signal(c[:, order], mask=MASK[:, order]))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", CROSS)
def test_hidden_tokens_change_nothing_whatever_they_hold(spec):
    module = create(spec).double()
    x, c = draw(2, 5, 8).double(), draw(2, 4, 6).double()
    want = module(x, Signal(c, mask=MASK))
    spoilt = torch.where(MASK[..., None], c, torch.nan)
    longer = torch.cat([spoilt, torch.full((2, 3, 6), torch.inf).double()], 1)
    padded = Signal(longer, mask=nn.functional.pad(MASK, (0, 3)))
    torch.testing.assert_close(module(x, padded), want, rtol=0, atol=1e-12)
    torch.autograd.backward(module(x, padded).sum())
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_a_mask_that_hides_nothing_is_no_mask():
    module = create(CROSS[0]).double()
    x, c = draw(2, 5, 8).double(), draw(2, 4, 6).double()
    whole = Signal(c, mask=torch.ones(2, 4, dtype=torch.bool))
    torch.testing.assert_close(module(x, whole), module(x, c), rtol=0, atol=1e-12)


def test_every_position_asks_by_itself():
    module = create(CROSS[0], channel_dim=1)
    x, c = draw(2, 8, 3, 4), draw(2, 4, 6)
    other = x.clone()
    other[:, :, 1, 2] += 1
    changed = (module(x, c) != module(other, c)).any(1)
    assert changed[:, 1, 2].all()
    assert changed.sum() == 2


def test_keys_and_values_are_generated_once_for_any_features():
    module = create(CROSS[0])
    met = module.generate(Signal(draw(2, 4, 6), mask=MASK))
    assert [tuple(leaf.shape) for leaf in met] == [(2, 2, 4, 4), (2, 2, 4, 4), (2, 4)]
    assert met._fields == ("key", "value", "mask")
    assert module.generate(draw(2, 4, 6))._fields == ("key", "value")
    for x in (draw(2, 8), draw(2, 5, 8), draw(2, 3, 4, 8)):
        assert torch.equal(module.modulate(x, met), module(x, Signal(draw(2, 4, 6), mask=MASK)))


def test_a_null_is_a_token_of_every_sample():
    module = create(CROSS[1])
    met = module.generate(Signal(draw(2, 4, 6), mask=MASK))
    assert torch.equal(met.key[:, :, 0], module.null_key.expand(2, 2, 3))
    assert torch.equal(met.value[:, :, 0], module.null_value.expand(2, 2, 3))
    assert torch.equal(met.mask, nn.functional.pad(MASK, (1, 0), value=True))


def test_with_a_null_a_sample_may_have_no_token():
    module = create(CROSS[1]).double()
    x, c = draw(2, 5, 8).double(), draw(2, 4, 6).double()
    y = module(x, Signal(c, mask=torch.tensor([[True] * 4, [False] * 4])))
    alone = module.null_value.flatten() @ module.out.weight.T + module.out.bias
    torch.testing.assert_close(y[1], x[1] + alone, rtol=0, atol=1e-12)


def test_without_a_null_such_a_sample_is_an_error():
    module = create(CROSS[0], name="mid.attn")
    signal = Signal(draw(2, 4, 6), mask=torch.tensor([[True] * 4, [False] * 4]))
    with pytest.raises(ConditionError) as caught:
        module(draw(2, 5, 8), signal)
    assert str(caught.value) == (
        "cross_attention at 'mid.attn': Signal.mask hides every token of the samples [1], tokens "
        "(2, 4, 6); show one token at least, as a nullable encoder does of an absent condition, "
        "or give the component null keys where it has the option"
    )


def test_compiled_such_a_sample_attends_to_zeros():
    module = create(CROSS[0])
    x, mask = draw(2, 5, 8), torch.tensor([[True] * 4, [False] * 4])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = compiled(x, Signal(draw(2, 4, 6), mask=mask))
    torch.testing.assert_close(y[1], x[1] + module.out.bias, rtol=0, atol=1e-6)
    torch.autograd.backward(y.sum())
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_no_device_is_given_a_softmax_over_nothing():
    module = create("cross_attention(heads=2, bias=True)")
    generate = torch.compile(module.generate, backend="eager", fullgraph=True)
    mask = torch.tensor([[True, False, True, True], [False] * 4])
    met = generate(Signal(draw(2, 4, 6), mask=mask))
    assert torch.equal(met.mask, torch.stack([mask[0], ~mask[1]]))
    assert not met.value[1].any()
    assert met.value[0].all()
    assert met.key.all()


@pytest.mark.parametrize("spec", CROSS)
def test_cross_attention_starts_as_published(spec):
    module = create(spec, features=512, condition_dim=300)
    bound = {"query": 512, "key": 300, "value": 300, "out": module.out.in_features}
    for name, width in bound.items():
        weight = getattr(module, name).weight
        assert weight.abs().max().item() == pytest.approx(1 / math.sqrt(width), rel=0.01)
    if module.norm is not None:
        assert torch.equal(module.norm.weight, torch.ones(512))
        assert not module.norm.bias.any()
    if module.null_key is not None:
        many = create("cross_attention(heads=512, head_dim=4, null=True)")
        for null in (many.null_key, many.null_value):
            assert null.std().item() == pytest.approx(1, rel=0.05)


def test_init_identity_is_x_whatever_the_tokens():
    module = create("cross_attention(heads=2, null=True, init='identity')")
    x = draw(2, 5, 8)
    assert torch.equal(module(x, draw(2, 4, 6)), x)
    assert not module.out.weight.any()
    assert not module.out.bias.any()


def test_without_a_residual_there_is_no_identity():
    with pytest.raises(SpecError) as caught:
        condmod.configure("cross_attention(residual=False, init='identity')")
    assert str(caught.value).splitlines()[0] == (
        "cross_attention: init='identity' needs residual=True: y = x is x with nothing added"
    )


def test_heads_that_do_not_divide_are_an_error_with_those_that_do():
    with pytest.raises(SiteError) as caught:
        create("cross_attention", features=12, name="mid.attn")
    assert str(caught.value) == (
        "cross_attention at 'mid.attn': heads=8 does not divide features=12; choose heads from "
        "[1, 2, 3, 4, 6, 12], or say head_dim, the channels of one head"
    )
    assert create("cross_attention(head_dim=5)", features=12).query.out_features == 40


def test_the_biases_are_those_that_the_option_says():
    for bias in (False, True):
        module = create(f"cross_attention(heads=2, bias={bias})")
        held = [getattr(module, name).bias is not None for name in ("query", "key", "value", "out")]
        assert held == [bias, bias, bias, True]


@pytest.mark.parametrize(
    ("condition", "error", "text"),
    [
        (
            Signal(draw(2, 4, 6), mask=torch.ones(2, 3, dtype=torch.bool)),
            ConditionError,
            "Signal.mask is bool, one per token, True where it is real; got torch.bool (2, 3) "
            "with tokens (2, 4, 6)",
        ),
        (
            draw(2, 4, 5),
            ShapeError,
            "takes one token or more, (B, S, condition_dim=6); got a condition (2, 4, 5)",
        ),
        (
            draw(2, 6),
            ShapeError,
            "takes one token or more, (B, S, condition_dim=6); got a condition (2, 6)",
        ),
        (
            torch.ones(2, 4, 6, dtype=torch.long),
            ConditionError,
            "takes embedded tokens as its condition; got torch.int64",
        ),
        (
            Signal(draw(2, 4, 6), present=torch.tensor([True, False])),
            ConditionError,
            "takes tokens and their mask, without `present`",
        ),
        (
            draw(1, 4, 6),
            ShapeError,
            "takes tokens (B, S, condition_dim=6) for features (B, ..., features=8); got features "
            "(2, 5, 8) and a condition (1, 4, 6)",
        ),
    ],
)
def test_what_is_no_set_of_tokens_is_an_error_with_its_place(condition, error, text):
    with pytest.raises(error) as caught:
        create(CROSS[0], name="mid.attn")(draw(2, 5, 8), condition)
    assert str(caught.value).startswith("cross_attention at 'mid.attn'")
    assert text in str(caught.value)


def test_keys_of_another_batch_are_an_error():
    module = create(CROSS[0], name="mid.attn")
    with pytest.raises(ShapeError) as caught:
        module.modulate(draw(2, 5, 8), module.generate(draw(1, 4, 6)))
    assert str(caught.value) == (
        "cross_attention at 'mid.attn': the tokens are of 1 sample(s), the features (2, 5, 8) of "
        "2; a single sample is not repeated"
    )


# --- tokens -----------------------------------------------------------------------------------


def encoder(spec, out_dim=5, seed=0):
    torch.manual_seed(seed)
    module = condmod.create_encoder(spec, out_dim)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.eval()


def fuse(**inputs):
    joined = ", ".join(f"'{name}': {spec}" for name, spec in inputs.items())
    return f"fuse(inputs={{{joined}}})"


KEEP = "tokens(features=7, mode='keep', nullable=True)"
POOL = [
    "tokens(features=7, nullable=True)",
    "tokens(features=7, pooling='attention', nullable=True)",
]
PRESENT = torch.tensor([True, False])


def test_kept_tokens_keep_their_mask():
    module, value = encoder(KEEP), draw(2, 4, 7)
    out = module(Signal(value, mask=MASK))
    assert torch.equal(out.mask, MASK)
    assert torch.equal(out.value[MASK], module.proj(value)[MASK])
    assert torch.equal(out.value[~MASK], module.proj.bias.expand(3, -1))
    assert torch.equal(module(value), module.proj(value))


@pytest.mark.parametrize("spec", [KEEP, *POOL])
def test_what_hidden_tokens_hold_reaches_no_gradient(spec):
    module = encoder(spec)
    spoilt = torch.where(MASK[..., None], draw(2, 4, 7), torch.nan)
    out = module(Signal(spoilt, mask=MASK))
    value = out.value if spec == KEEP else out
    torch.autograd.backward(value.square().sum())
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("count", [1, 4, 9])
def test_an_absent_set_is_its_null_at_any_length_with_nothing_hidden(count):
    module = encoder(KEEP)
    mask = torch.zeros(2, count, dtype=torch.bool)
    mask[0, 0] = True
    out = module(Signal(draw(2, count, 7), mask=mask, present=PRESENT))
    assert torch.equal(out.value[1], module.null.expand(count, -1))
    assert torch.equal(out.mask, torch.stack([mask[0], torch.ones(count, dtype=torch.bool)]))


@pytest.mark.parametrize("spec", POOL)
def test_pooled_tokens_have_neither_order_nor_padding(spec):
    module, value = encoder(spec).double(), draw(2, 4, 7).double()
    want = module(Signal(value, mask=MASK))
    assert isinstance(want, torch.Tensor)
    order = torch.tensor([2, 0, 3, 1])
    again = module(Signal(value[:, order], mask=MASK[:, order]))
    torch.testing.assert_close(again, want, rtol=0, atol=1e-12)
    spoilt = torch.where(MASK[..., None], value, torch.nan)
    longer = torch.cat([spoilt, torch.full((2, 3, 7), torch.inf).double()], 1)
    padded = module(Signal(longer, mask=nn.functional.pad(MASK, (0, 3))))
    torch.testing.assert_close(padded, want, rtol=0, atol=1e-12)
    assert not torch.allclose(module(value), want, rtol=0, atol=1e-3)


def test_the_two_poolings_differ_unless_the_query_is_zero():
    mean, attention = (encoder(spec).double() for spec in POOL)
    attention.proj.load_state_dict(mean.proj.state_dict())
    signal = Signal(draw(2, 4, 7).double(), mask=MASK)
    assert not torch.allclose(attention(signal), mean(signal), rtol=0, atol=1e-2)
    nn.init.zeros_(attention.query.weight)
    torch.testing.assert_close(attention(signal), mean(signal), rtol=0, atol=1e-12)


def test_attention_pooling_leans_to_the_token_that_fits_its_query():
    module = encoder(POOL[1]).double()
    value = draw(2, 4, 7).double()
    with torch.no_grad():
        module.query.weight.copy_(100 * value[0, 2])
    best = (value[1] @ value[0, 2]).argmax()
    torch.testing.assert_close(module(value)[0], module.proj(value[0, 2]))
    torch.testing.assert_close(module(value)[1], module.proj(value[1, best]))


@pytest.mark.parametrize("spec", POOL)
def test_pooling_nothing_is_an_error_unless_the_sample_is_absent(spec):
    module, value = encoder(spec), draw(2, 4, 7)
    mask = torch.tensor([[True] * 4, [False] * 4])
    with pytest.raises(ConditionError) as caught:
        module(Signal(value, mask=mask))
    assert str(caught.value) == (
        "tokens: Signal.mask hides every token of the samples [1]; show one token at least, or say "
        "that they are absent: tokens(nullable=True) with Signal(..., present=...)"
    )
    out = module(Signal(value, mask=mask, present=PRESENT))
    assert torch.equal(out[1], module.null)
    torch.testing.assert_close(out[0], module(value)[0])


@pytest.mark.parametrize("spec", POOL)
def test_compiled_pooling_nothing_gives_the_bias(spec):
    module = encoder(spec)
    mask = torch.tensor([[True] * 4, [False] * 4])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    out = compiled(Signal(draw(2, 4, 7), mask=mask))
    torch.testing.assert_close(out[1], module.proj.bias)
    torch.autograd.backward(out.sum())
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("spec", "signal", "error", "text"),
    [
        (
            KEEP,
            draw(2, 7),
            ShapeError,
            "tokens takes a set of tokens, (B, S, 7); got (2, 7)",
        ),
        (
            POOL[0],
            draw(2, 4, 6),
            ShapeError,
            "tokens takes one token or more of features=7; got (2, 4, 6)",
        ),
        (
            POOL[0],
            draw(2, 0, 7),
            ShapeError,
            "tokens takes one token or more of features=7; got (2, 0, 7)",
        ),
        (
            KEEP,
            torch.ones(2, 4, 7, dtype=torch.long),
            ConditionError,
            "tokens takes embedded tokens; got torch.int64; token ids go through an embedding "
            "first",
        ),
        (
            POOL[0],
            Signal(draw(2, 4, 7), mask=torch.ones(2, 4)),
            ConditionError,
            "tokens: Signal.mask is bool (B, S), one per token; got torch.float32 (2, 4) for "
            "B, S = (2, 4)",
        ),
        (
            KEEP,
            Signal(draw(2, 4, 7), mask=torch.ones(2, 3, dtype=torch.bool)),
            ConditionError,
            "tokens: Signal.mask is bool (B, S), one per token; got torch.bool (2, 3) for "
            "B, S = (2, 4)",
        ),
    ],
)
def test_what_is_no_set_is_an_error_of_the_encoder(spec, signal, error, text):
    with pytest.raises(error) as caught:
        encoder(spec)(signal)
    assert str(caught.value) == text


def test_what_is_kept_is_not_pooled():
    with pytest.raises(SpecError) as caught:
        condmod.configure("tokens(features=7, mode='keep', pooling='attention')")
    assert str(caught.value).splitlines()[0] == (
        "tokens: pooling='attention' needs mode='pool'; 'keep' pools nothing"
    )


def test_kept_tokens_feed_cross_attention_absent_ones_too():
    tokens, attention = encoder(KEEP, 6), create(CROSS[0])
    x, mask = draw(2, 5, 8), torch.tensor([[True, True, False, False], [False] * 4])
    c = tokens(Signal(draw(2, 4, 7), mask=mask, present=PRESENT))
    y = attention(x, c)
    alone = attention(x[:1], tokens(draw(2, 4, 7)[:1, :2]))
    torch.testing.assert_close(y[:1], alone)
    null = attention(x[1:], tokens.null.expand(1, 1, -1))
    torch.testing.assert_close(y[1:], null)


def test_pooled_tokens_stand_in_a_fuse_beside_one_signal_per_sample():
    module = encoder(fuse(text=POOL[0], label="label(classes=3)"))
    text, label = Signal(draw(2, 4, 7), mask=MASK, present=PRESENT), torch.tensor([1, 2])
    parts = (module.inputs["text"](text), module.inputs["label"](label))
    torch.testing.assert_close(module({"text": text, "label": label}), sum(parts))


def test_kept_tokens_in_a_fuse_take_one_signal_per_sample_at_every_token():
    module = encoder(fuse(text=KEEP, label="label(classes=3)"), 6)
    text, label = Signal(draw(2, 4, 7), mask=MASK), torch.tensor([1, 2])
    c = module({"text": text, "label": label})
    assert torch.equal(c.mask, MASK)
    want = module.inputs["text"](text).value + module.inputs["label"](label)[:, None]
    torch.testing.assert_close(c.value, want)
    assert create(CROSS[0])(draw(2, 5, 8), c).shape == (2, 5, 8)


def test_a_fuse_refuses_two_sets_of_different_lengths():
    module = encoder(fuse(one=KEEP, two=KEEP))
    with pytest.raises(ShapeError) as caught:
        module({"one": draw(2, 4, 7), "two": draw(2, 3, 7)})
    assert str(caught.value) == (
        "fuse: the inputs 'one' and 'two' have 4 and 3 positions; a signal has one value per "
        "sample, or as many as the others"
    )


def test_cross_attention_owns_no_encoder():
    with pytest.raises(SpecError, match="take a global or aligned condition; build the encoder"):
        condmod.create(
            f"multi_condition(inner=cross_attention, encoder={fuse(text=KEEP)})", features=8
        )


# --- decoupled_attention ----------------------------------------------------------------------

DECOUPLED = "decoupled_attention(heads=2)"


def pair(text=4, image=3, batch=2):
    return {"text": draw(batch, text, 6), "image": draw(batch, image, 6, seed=2)}


def apart(module):
    """Keys and values of the image away from those of the text."""
    with torch.no_grad():
        for layer in (module.key_image, module.value_image):
            layer.weight.normal_()
    return module


def test_without_the_image_it_is_cross_attention():
    module, plain = apart(create(DECOUPLED)), create(CROSS[0])
    missing = {"key_image.weight", "value_image.weight"}
    state = {key: value for key, value in module.state_dict().items() if key not in missing}
    plain.load_state_dict(state)
    x, c = draw(2, 5, 8), pair()
    module.set_scale(0)
    assert torch.equal(module(x, c), plain(x, c["text"]))
    module.set_scale(1)
    assert not torch.allclose(module(x, c), plain(x, c["text"]), atol=1e-2)


def test_the_scale_acts_in_proportion_on_modulations_that_were_kept():
    module = apart(create(DECOUPLED)).double()
    x, c = draw(2, 5, 8).double(), {name: value.double() for name, value in pair().items()}
    kept = module.generate(c)
    found = []
    for scale in (0, 1, 2.5):
        module.set_scale(scale)
        found.append(module.modulate(x, kept))
    text, once, more = found
    torch.testing.assert_close(more - text, 2.5 * (once - text), rtol=0, atol=1e-12)


def test_the_scale_is_no_part_of_a_state_dict_and_outlasts_one():
    module = create("decoupled_attention(heads=2, scale=0.25)")
    assert "scale" not in module.state_dict()
    module.set_scale(0.5)
    module.load_state_dict(create(DECOUPLED).state_dict())
    assert module.scale.item() == 0.5
    with torch.device("meta"):
        ghost = create("decoupled_attention(heads=2, scale=0.25)")
    ghost.load_state_dict(module.state_dict(), assign=True)
    assert ghost.scale.item() == 0.25
    module.reset_parameters()
    assert module.scale.item() == 0.25


def test_a_new_scale_compiles_no_new_graph():
    module = apart(create(DECOUPLED))
    x, c = draw(2, 5, 8), pair()
    held, counter = module.scale, torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for scale in (1, 0.3, 0):
        module.set_scale(scale)
        assert torch.equal(compiled(x, c), module(x, c))
    assert counter.frame_count == 1
    assert module.scale is held


@pytest.mark.parametrize("scale", [-0.1, 10.5])
def test_a_scale_out_of_range_is_an_error(scale):
    module = create(DECOUPLED, name="mid.attn")
    with pytest.raises(ConditionError) as caught:
        module.set_scale(scale)
    assert str(caught.value) == (
        f"decoupled_attention at 'mid.attn': scale is from 0 (the text alone) to 10; got {scale}"
    )
    assert module.scale.item() == 1


def test_the_image_begins_as_the_text():
    module = create("decoupled_attention(heads=2, bias=True)")
    assert torch.equal(module.key_image.weight, module.key.weight)
    assert torch.equal(module.value_image.weight, module.value.weight)
    assert module.key_image.bias is None
    assert module.value_image.bias is None
    assert module.key.bias is not None


def test_decoupled_attention_starts_as_the_identity_where_that_is_said():
    module = create("decoupled_attention(heads=2, init='identity')")
    x = draw(2, 5, 8)
    assert torch.equal(module(x, pair()), x)


def test_each_set_has_its_own_mask():
    module = apart(create(DECOUPLED)).double()
    x, c = draw(2, 5, 8).double(), {name: value.double() for name, value in pair(4, 4).items()}
    masked = {"text": Signal(c["text"], mask=MASK), "image": Signal(c["image"], mask=~MASK)}
    got = module(x, masked)
    for sample in range(2):
        alone = {
            "text": c["text"][sample : sample + 1, MASK[sample]],
            "image": c["image"][sample : sample + 1, ~MASK[sample]],
        }
        want = module(x[sample : sample + 1], alone)
        torch.testing.assert_close(got[sample : sample + 1], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("condition", "error", "text"),
    [
        (
            {"text": draw(2, 4, 6)},
            ConditionError,
            "takes a mapping with the keys ['text', 'image']; missing ['image'], surplus []",
        ),
        (
            {**pair(), "pose": draw(2, 4, 6)},
            ConditionError,
            "takes a mapping with the keys ['text', 'image']; missing [], surplus ['pose']",
        ),
        (
            draw(2, 4, 6),
            ConditionError,
            "takes a mapping with the keys ['text', 'image']; got Tensor",
        ),
        (
            {**pair(), "image": draw(2, 3, 5)},
            ShapeError,
            ", 'image' takes one token or more, (B, S, condition_dim=6); got a condition (2, 3, 5)",
        ),
        (
            {**pair(), "image": Signal(draw(2, 4, 6), mask=torch.zeros(2, 4, dtype=torch.bool))},
            ConditionError,
            ", 'image': Signal.mask hides every token of the samples [0, 1], tokens (2, 4, 6)",
        ),
        (
            pair(batch=1),
            ShapeError,
            "takes tokens (B, S, condition_dim=6) by the names ['text', 'image'] for features "
            "(B, ..., features=8); got features (2, 5, 8) and 'text' (1, 4, 6) and 'image' "
            "(1, 3, 6)",
        ),
        (
            {**pair(), "image": draw(2, 3, 6).to("meta")},
            ConditionError,
            ": the condition is on meta, the features are on cpu; move one of them",
        ),
    ],
)
def test_what_is_no_pair_of_sets_is_an_error_with_its_place(condition, error, text):
    with pytest.raises(error) as caught:
        create(DECOUPLED, name="mid.attn")(draw(2, 5, 8), condition)
    assert str(caught.value).startswith("decoupled_attention at 'mid.attn'")
    assert text in str(caught.value)


def test_two_sets_of_two_batches_are_an_error_before_any_features_come():
    module = create(DECOUPLED, name="mid.attn")
    with pytest.raises(ShapeError) as caught:
        module.generate({"text": draw(2, 4, 6), "image": draw(1, 3, 6)})
    assert str(caught.value) == (
        "decoupled_attention at 'mid.attn': the sets of tokens have batches of {'text': 2, "
        "'image': 1}; a single sample is not repeated"
    )


@pytest.mark.parametrize("name", ["cross_attention(heads=2)", "decoupled_attention(heads=2)"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_meet_float32_parameters(name, dtype):
    torch.manual_seed(0)
    module = condmod.create(name, features=8, condition_dim=6)
    x, tokens = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    given = tokens if "cross" in name else {"text": tokens, "image": tokens}
    want = module(x, given)
    got = module(x.to(dtype), given)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)
