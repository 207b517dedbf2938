"""The table of what acts around the sublayers of transformer blocks."""

from dataclasses import replace

import torch.nn.functional as F
from cases_affine import FIRST, LAST, back, channels_last, naive

from condmod.testing import ModulatorCase

ORDER = ("shift", "scale", "gate")


def layer_norm(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def rms_norm(x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def affine_and_gate(x, read, chunks, sublayer, normed, order=ORDER, gate=lambda g: g):
    """x and a gated branch that reads `read`; `chunks` are three, in this order."""
    part = dict(zip(order, chunks, strict=True))
    return x + gate(part["gate"]) * sublayer((1 + part["scale"]) * normed(read) + part["shift"])


def one_stream(eps, norm=layer_norm):
    """Parts in turn, rows [shift, scale, gate] for each."""

    def formula(x, rows, state, *sublayers):
        chunks = rows.chunk(3 * len(sublayers), -1)
        for part, sublayer in enumerate(sublayers):
            mine = chunks[3 * part : 3 * part + 3]
            x = affine_and_gate(x, x, mine, sublayer, lambda h: norm(h, eps))
        return x

    return formula


def dual_attention(x, rows, state, attention, second, feed_forward):
    chunks = rows.chunk(9, -1)

    def normed(h):
        return layer_norm(h, 1e-6)

    h = affine_and_gate(x, x, chunks[:3], attention, normed)
    h = affine_and_gate(h, x, chunks[6:], second, normed)
    return affine_and_gate(h, h, chunks[3:6], feed_forward, normed)


def with_affine(x, rows, state, *sublayers):
    def norm(h, eps):
        return layer_norm(h, eps) * state["norm.weight"] + state["norm.bias"]

    return one_stream(1e-5, norm)(x, rows, state, *sublayers)


def sigmoid_gates(norm):
    def formula(x, rows, state, *sublayers):
        names = ("attention_norm", "feed_forward_norm")
        both = zip(names, sublayers, rows.chunk(2, -1), strict=True)
        for name, sublayer, three in both:
            x = affine_and_gate(
                x,
                x,
                three.chunk(3, -1),
                sublayer,
                lambda h, weight=state[f"{name}.weight"]: norm(h, 1e-5) * weight,
                order=("scale", "shift", "gate"),
                gate=lambda g: 1 / (1 + (g - 1).exp()),
            )
        return x

    return formula


def neutral(site, eps, norm="layer", reads=()):
    """The pass at scale 1, shift 0, gate 1."""

    def run(module, x, *sublayers):
        stages = [x]
        for part, sublayer in enumerate(sublayers):
            h = stages[reads[part] if reads else part].movedim(site.channel_dim, -1)
            normed = getattr(F, f"{norm}_norm")(h, (site.features,), eps=eps)
            stages.append(stages[-1] + sublayer(normed.movedim(-1, site.channel_dim)))
        return stages[-1]

    return run


def trunk(site, rows, formula):
    """A reference for a bank of one: rows(c, state), then the formula."""

    def reference(state, x, condition, *sublayers):
        state = {short(key): value for key, value in state.items()}
        c = condition.movedim(1, -1) if condition.ndim > 2 and site.channel_dim == 1 else condition
        h = rows(c, state)
        h = h.reshape(h.shape[0], *[1] * (x.ndim - h.ndim), *h.shape[1:])
        return back(site, formula(channels_last(site, x), h, state, *sublayers))

    return reference


def short(key):
    """A key without the bank's and the site's names."""
    kind, rest = key.removeprefix("bank.").split(".", 1)
    return f"shared.{rest}" if kind == "shared" else rest.split(".", 1)[1]


def linear(h, state, name, bias=True):
    return h @ state[f"{name}.weight"].T + (state[f"{name}.bias"] if bias else 0)


def bare(c, state):
    return linear(F.silu(c), state, "shared.proj", bias=False)


def tabled(c, state):
    return linear(F.silu(c), state, "shared.proj") + state["table"].flatten()


def two_linears(c, state):
    hidden = F.silu(linear(c, state, "shared.hidden"))
    return linear(hidden, state, "shared.proj") + state["table"]


def low_rank(c, state):
    embedding = F.silu(rms_norm(c, 1e-6) * state["shared.norm.weight"])
    own = linear(linear(embedding, state, "proj.0", bias=False), state, "proj.1", bias=False)
    hidden = F.silu(linear(c, state, "shared.hidden", bias=False))
    return own + linear(hidden, state, "shared.proj", bias=False)


def own_projection(site):
    plain = one_stream(1e-6)
    wide = replace(site, features=32)  # LN of few, nearly equal channels blows rounding up
    yield ModulatorCase("mmdit", site, naive(site, plain, F.silu), neutral=neutral(site, 1e-6))
    yield ModulatorCase(
        "flux(parts=1)", site, naive(site, plain, F.silu), neutral=neutral(site, 1e-6)
    )
    yield ModulatorCase(
        "sd35",
        wide,
        naive(wide, dual_attention, F.silu),
        neutral=neutral(wide, 1e-6, reads=(0, 0, 2)),
    )
    yield ModulatorCase(
        "cogview3", wide, naive(wide, one_stream(1e-5), F.silu), neutral=neutral(wide, 1e-5)
    )
    yield ModulatorCase(
        "cogvideox", site, naive(site, with_affine, F.silu), neutral=neutral(site, 1e-5)
    )


def shared_trunk(site):
    plain = one_stream(1e-6)
    yield ModulatorCase("flux2", site, trunk(site, bare, plain))
    yield ModulatorCase(
        "adaln_single", site, trunk(site, tabled, plain), neutral=neutral(site, 1e-6)
    )
    yield ModulatorCase(
        "adaln_single(norm='rms')",
        site,
        trunk(site, tabled, one_stream(1e-6, rms_norm)),
        neutral=neutral(site, 1e-6, "rms"),
    )
    yield ModulatorCase("wan", site, trunk(site, tabled, plain), neutral=neutral(site, 1e-6))
    yield ModulatorCase("stable_audio", site, trunk(site, two_linears, sigmoid_gates(layer_norm)))
    yield ModulatorCase(
        "stable_audio(norm='rms')", site, trunk(site, two_linears, sigmoid_gates(rms_norm))
    )
    yield ModulatorCase("cosmos(rank=3)", site, trunk(site, low_rank, plain))


CASES = [
    case
    for site in (LAST, FIRST)
    for family in (own_projection, shared_trunk)
    for case in family(site)
]
