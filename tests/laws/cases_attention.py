"""The table of the attention family: one head, one query, one token after another, in float64."""

import math

import torch

from condmod import Signal, Site
from condmod.testing import EncoderCase, ModulatorCase

LAST = Site(6, 4, name="blocks.0.attn2")
FIRST = Site(6, 4, channel_dim=1, name="mid.attn")
# many at the end: a small change of a key moves y by less than bfloat16 rounds, which averages out
POSITIONS = ((), (1,), (5,), (2, 3), (4, 5, 4))


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(count, seed=1):
    def make(batch, positions, dtype):
        return draw(seed, batch, count, 4).to(dtype)

    return make


def masked(count, seed=1, *, bare=False):
    """Tokens of which each sample has the first, unless `bare`: then every second has none."""

    def make(batch, positions, dtype):
        mask = draw(seed + 1, batch, count) > 0
        mask[:, 0] = True
        if bare:
            mask[1::2] = False
        return Signal(draw(seed, batch, count, 4).to(dtype), mask=mask)

    return make


def linear(state, name, h):
    bias = state.get(f"{name}.bias")
    y = h @ state[f"{name}.weight"].T
    return y if bias is None else y + bias


def layer_norm(state, x):
    mean = x.mean(-1, keepdim=True)
    unit = (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(1e-5).sqrt()
    return unit * state["norm.weight"] + state["norm.bias"]


def found(state, query, given, heads, suffix=""):
    """What every query of a sample finds among its tokens, by loops."""
    signal = given if isinstance(given, Signal) else Signal(given)
    key, value = (linear(state, f"{name}{suffix}", signal.value) for name in ("key", "value"))
    out = torch.zeros_like(query)
    width = query.shape[-1] // heads
    for sample in range(len(query)):
        real = range(key.shape[1])
        if signal.mask is not None:
            real = [token for token in real if signal.mask[sample, token]]
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            keys = [key[sample, token, own] for token in real]
            values = [value[sample, token, own] for token in real]
            if "null_key" in state:
                keys.append(state["null_key"][head])
                values.append(state["null_value"][head])
            for position in range(query.shape[1]):
                asked = query[sample, position, own]
                weights = [torch.exp(asked @ key / math.sqrt(width)) for key in keys]
                mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
                out[sample, position, own] = mean
    return out


def naive(site, heads, attended, *, residual=True):
    """A reference: x plus out of what `attended` makes of (state, queries, condition, heads)."""

    def reference(state, x, condition):
        last = x.movedim(site.channel_dim, -1)
        flat = last.reshape(len(x), -1, 6)
        h = layer_norm(state, flat) if "norm.weight" in state else flat
        y = linear(state, "out", attended(state, linear(state, "query", h), condition, heads))
        y = flat + y if residual else y
        return y.reshape(last.shape).movedim(-1, site.channel_dim)

    return reference


def cross_attention(site):
    rows = {
        "cross_attention(heads=2)": (2, tokens(3)),
        "cross_attention(heads=2, norm='none')": (2, masked(5)),
        "cross_attention(heads=3, head_dim=4, bias=True, null=True)": (3, masked(4, bare=True)),
    }
    for spec, (heads, condition) in rows.items():
        reference = naive(site, heads, found)
        yield ModulatorCase(spec, site, reference, POSITIONS, condition)
    spec = "cross_attention(heads=1, null=True, residual=False)"
    reference = naive(site, 1, found, residual=False)
    yield ModulatorCase(spec, site, reference, POSITIONS, tokens(1))


def text_image(batch, positions, dtype):
    return {
        "text": tokens(4, 3)(batch, positions, dtype),
        "image": masked(3, 8)(batch, positions, dtype),
    }


def decoupled(scale):
    def attended(state, query, condition, heads):
        text = found(state, query, condition["text"], heads)
        return text + scale * found(state, query, condition["image"], heads, "_image")

    return attended


def decoupled_attention(site):
    for spec, heads, scale in (
        ("decoupled_attention(heads=2, scale=0.5)", 2, 0.5),
        ("decoupled_attention(heads=1, head_dim=8, norm='none', bias=True, residual=False)", 1, 1),
    ):
        reference = naive(site, heads, decoupled(scale), residual="residual" not in spec)
        yield ModulatorCase(spec, site, reference, POSITIONS, text_image)


def raw(count=None, *, mask=False):
    """Tokens of another width: `count` of them, or as many as positions say; the first is real."""

    def make(batch, positions, dtype):
        value = draw(6, batch, *(positions or (count,)), 7).to(dtype)
        if not mask:
            return value
        real = draw(7, *value.shape[:2]) > 0
        real[:, 0] = True
        return Signal(value, mask=real)

    return make


def kept(state, given):
    if isinstance(given, Signal):
        return linear(state, "proj", given.value * given.mask[..., None])
    return linear(state, "proj", given)


def pooled(state, given):
    """The mean of the real tokens, or weighted by how well they fit the query, one by one."""
    out = []
    for sample, value in enumerate(given.value):
        real = [token for token, is_real in zip(value, given.mask[sample], strict=True) if is_real]
        weights = [torch.ones(1)] * len(real)
        if "query.weight" in state:
            weights = [torch.exp(state["query.weight"] @ token) for token in real]
        out.append(sum(w * v for w, v in zip(weights, real, strict=True)) / sum(weights))
    return linear(state, "proj", torch.stack(out))


def tokens_cases():
    keep = "tokens(features=7, dim=5, mode='keep', nullable=True)"
    sets = {"positions": ((1,), (2,), (5,)), "per_sample": False}
    yield EncoderCase(keep, raw(), kept, **sets)
    yield EncoderCase(keep, raw(mask=True), kept, 9, label="masked tokens, kept", **sets)
    mean = "tokens(features=7, dim=5)"
    attention = "tokens(features=7, dim=5, pooling='attention', nullable=True)"
    for spec, label in ((mean, "mean of tokens"), (attention, "attention pooling")):
        yield EncoderCase(spec, raw(4, mask=True), pooled, positions=(), label=label)


CASES = [
    *(case for site in (LAST, FIRST) for case in cross_attention(site)),
    *(case for site in (LAST, FIRST) for case in decoupled_attention(site)),
    *tokens_cases(),
]
