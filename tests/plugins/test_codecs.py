"""Every codec: the source's formula on the source's parameters is what ours then computes."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import condmod
from condmod import Bank, CodecError, Site, convert, create, create_bank, list_modulators
from condmod.codec import Layout

C, D = 8, 6
PLACES = ("blocks.0", "blocks.1")


class Case(NamedTuple):
    """A component, a source, its parameters by its keys, and its formula on them."""

    spec: str
    source: str
    shapes: dict[str, tuple[int, ...]]
    formula: object
    shared: dict[str, tuple[int, ...]] | None = None


def lin(name, rows, *, bias=True):
    shapes = {f"{name}.weight": (rows * C, D)}
    return {**shapes, f"{name}.bias": (rows * C,)} if bias else shapes


def rows(p, name, c, chunks):
    return F.linear(c, p[f"{name}.weight"], p.get(f"{name}.bias"))[:, None].chunk(chunks, -1)


def norm(x, p=None, name=""):
    affine = () if p is None else (p[f"{name}.weight"], p[f"{name}.bias"])
    return F.layer_norm(x, (C,), *affine, eps=1e-6)


def rms(x, p, name, eps):
    return F.rms_norm(x, (C,), p[f"{name}.weight"], eps)


def affine(x, shift, scale):
    return x * (1 + scale) + shift


def textbook(p, x, c):
    (gamma,), (beta,) = rows(p, "fc_gamma", c, 1), rows(p, "fc_beta", c, 1)
    return gamma * x + beta


def edge(p, x, c):
    scale, shift = rows(p, "block.1", F.mish(c), 2)
    return affine(x, shift, scale)


def film_generator(p, x, c):
    gamma, beta = rows(p, "decoder_linear", c, 2)
    return (1 + gamma) * x + beta


def film_block(p, x, c, f):
    gamma, beta = rows(p, "decoder_linear", c, 2)
    y = (f(x) - p["bn1.running_mean"]) / (p["bn1.running_var"] + 1e-5).sqrt()
    return x + F.relu((1 + gamma) * y + beta)


def t5(p, x, c):
    scale, shift = rows(p, "film.scale_bias", c, 2)
    return affine(rms(x, p, "layer_norm", 1e-6), shift, scale)


def group(x, p=None):
    first = x.movedim(-1, 1)
    weights = () if p is None else (p["out_layers.0.weight"], p["out_layers.0.bias"])
    return F.group_norm(first, 4, *weights).movedim(1, -1)


def adm(p, x, c):
    scale, shift = rows(p, "emb_layers.1", F.silu(c), 2)
    return affine(group(x, p), shift, scale)


def adm_without(p, x, c):
    (shift,) = rows(p, "emb_layers.1", F.silu(c), 1)
    return group(x + shift, p)


def group_scaled(name):
    def formula(p, x, c):
        scale, shift = rows(p, name, c, 2)
        return affine(group(x), shift, scale)

    return formula


def adaln(name, order, normed="norm"):
    def formula(p, x, c):
        parts = dict(zip(order, rows(p, name, F.silu(c), 2), strict=True))
        held = p if f"{normed}.weight" in p else None
        return affine(norm(x, held, normed), parts["shift"], parts["scale"])

    return formula


def hunyuan(p, x, c):
    (shift,) = rows(p, "linear", F.silu(c), 1)
    return norm(x, p, "norm") + shift


def around(name, parts, order=None, eps=1e-6):
    def formula(p, x, c, *sublayers):
        chunks = rows(p, name, F.silu(c), 3 * parts)
        held = p if "norm.weight" in p else None
        for part, f in zip(order or range(parts), sublayers, strict=True):
            shift, scale, gate = chunks[3 * part : 3 * part + 3]
            normed = F.layer_norm(
                x, (C,), *(() if held is None else (p["norm.weight"], p["norm.bias"])), eps=eps
            )
            x = x + gate * f(affine(normed, shift, scale))
        return x

    return formula


def dual(p, x, c, attention, second, feed_forward):
    chunks = rows(p, "linear", F.silu(c), 9)
    (s1, m1, g1), (s3, m3, g3), (s2, m2, g2) = (chunks[i : i + 3] for i in (0, 3, 6))
    normed = norm(x)
    h = x + g1 * attention(affine(normed, s1, m1)) + g2 * second(affine(normed, s2, m2))
    return h + g3 * feed_forward(affine(norm(h), s3, m3))


def two_norms(projection, norms, act):
    def formula(p, x, c, *sublayers):
        chunks = rows(p, projection, act(c), 4)
        for part, f in enumerate(sublayers):
            scale, gate = chunks[2 * part : 2 * part + 2]
            y = f(rms(x, p, norms[2 * part], 1e-5) * (1 + scale))
            x = x + gate.tanh() * rms(y, p, norms[2 * part + 1], 1e-5)
        return x

    return formula


def stable_audio(p, x, c, *sublayers):
    h = F.silu(F.linear(c, p[f"{TRUNK}.0.weight"], p[f"{TRUNK}.0.bias"]))
    t = F.linear(h, p[f"{TRUNK}.2.weight"], p[f"{TRUNK}.2.bias"])
    chunks = (p["to_scale_shift_gate"] + t)[:, None].chunk(6, -1)
    for part, (f, gamma) in enumerate(zip(sublayers, ("pre_norm", "ff_norm"), strict=True)):
        scale, shift, gate = chunks[3 * part : 3 * part + 3]
        y = F.layer_norm(x, (C,), p[f"{gamma}.gamma"], eps=1e-5) * (1 + scale) + shift
        x = x + (1 - gate).sigmoid() * f(y)
    return x


def rms_scaled(name):
    def formula(p, x, c):
        (scale,) = rows(p, name, c, 1)
        return F.rms_norm(x, (C,), eps=1e-6) * (1 + scale)

    return formula


def policy(p, x, c):
    scale, shift = rows(p, "cond_encoder.1", F.mish(c), 2)
    return scale * x + shift


def policy_shift(p, x, c):
    (shift,) = rows(p, "cond_encoder.1", F.mish(c), 1)
    return x + shift


def single(trunk):
    def formula(p, x, c, *sublayers):
        t = F.linear(F.silu(c), p[f"{trunk}.weight"], p[f"{trunk}.bias"])
        chunks = (p["scale_shift_table"].reshape(6, C) + t.reshape(-1, 6, C)).unsqueeze(2).unbind(1)
        for part, f in enumerate(sublayers):
            shift, scale, gate = chunks[3 * part : 3 * part + 3]
            x = x + gate * f(affine(norm(x), shift, scale))
        return x

    return formula


def vectors(*names, leaves=("weight", "bias")):
    return {f"{name}.{leaf}": (C,) for name in names for leaf in leaves}


BN = {**vectors("bn1", leaves=("running_mean", "running_var")), "bn1.num_batches_tracked": ()}
GROUPS = "ada_group_norm(groups=4, use_scale_shift_norm={})"
DIT, TRUNK = "adaLN_modulation.1", "global_cond_embedder"
NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
DIFFUSERS_NORMS = ("norm1.norm", "norm2", *NORMS[2:])
SHIFT_SCALE, SCALE_SHIFT = ("shift", "scale"), ("scale", "shift")


def found(p, q, c, key, value):
    k, v = (F.linear(c, p[f"{name}.weight"], p.get(f"{name}.bias")) for name in (key, value))
    weights = (q @ k.transpose(1, 2) / C**0.5).softmax(-1)
    return weights @ v


def attention(p, x, c):
    q = F.linear(x, p["to_q.weight"], p.get("to_q.bias"))
    text = c["text"] if isinstance(c, dict) else c
    h = found(p, q, text, "to_k", "to_v")
    if isinstance(c, dict):
        h = h + 0.5 * found(p, q, c["image"], "processor.to_k_ip.0", "processor.to_v_ip.0")
    return x + F.linear(h, p["to_out.0.weight"], p["to_out.0.bias"])


TO = {"to_q.weight": (C, C), "to_k.weight": (C, D), "to_v.weight": (C, D)}
OUT = {"to_out.0.weight": (C, C), "to_out.0.bias": (C,)}
IP = {f"processor.to_{name}_ip.0.weight": (C, D) for name in "kv"}
ATTENTIONS = {
    "cross_attention(heads=1, norm='none')": {**TO, **OUT},
    "cross_attention(heads=1, norm='none', bias=True)": {
        **TO,
        **OUT,
        **{f"to_{name}.bias": (C,) for name in "qkv"},
    },
    "decoupled_attention(heads=1, norm='none', scale=0.5)": {**TO, **OUT, **IP},
}
CASES = [
    *(Case(spec, "diffusers", shapes, attention) for spec, shapes in ATTENTIONS.items()),
    Case("film", "textbook", {**lin("fc_gamma", 1), **lin("fc_beta", 1)}, textbook),
    Case("film(scale='one_plus')", "film", lin("decoder_linear", 2), film_generator),
    Case("film_block", "film", {**lin("decoder_linear", 2), **BN}, film_block),
    Case("dense_film", "edge", lin("block.1", 2), edge),
    Case("dense_film", "audio2photoreal", lin("block.1", 2), edge),
    Case(
        "t5_film",
        "diffusers",
        {
            **lin("film.scale_bias", 2, bias=False),
            **vectors("layer_norm", leaves=("weight",)),
        },
        t5,
    ),
    Case(GROUPS.format(True), "adm", {**lin("emb_layers.1", 2), **vectors("out_layers.0")}, adm),
    Case(
        GROUPS.format(False),
        "adm",
        {**lin("emb_layers.1", 1), **vectors("out_layers.0")},
        adm_without,
    ),
    Case(
        "ada_group_norm_diffusers(groups=4)",
        "diffusers",
        lin("linear", 2),
        group_scaled("linear"),
    ),
    Case(
        "ada_group_norm_k_diffusion(group_size=2)",
        "k_diffusion",
        lin("mapper", 2),
        group_scaled("mapper"),
    ),
    Case("adaln", "dit", lin(DIT, 2), adaln(DIT, SHIFT_SCALE)),
    Case("adaln(order='scale_shift')", "dit", lin(DIT, 2), adaln(DIT, SHIFT_SCALE)),
    Case(
        "adaln(order='scale_shift', affine=True)",
        "diffusers",
        {**lin("linear", 2), **vectors("norm")},
        adaln("linear", SCALE_SHIFT),
    ),
    Case("adaln", "diffusers", lin("linear", 2), adaln("linear", SCALE_SHIFT)),
    Case("hunyuan_shift", "diffusers", {**lin("linear", 1), **vectors("norm")}, hunyuan),
    Case("adaln_zero", "dit", lin(DIT, 6), around(DIT, 2)),
    Case("adaln_zero(parts=1)", "diffusers", lin("linear", 3), around("linear", 1)),
    Case("mmdit", "diffusers", lin("linear", 6), around("linear", 2)),
    Case("mmdit(parts=1)", "flux", lin("lin", 3), around("lin", 1)),
    Case("mmdit", "sd3", lin(DIT, 6), around(DIT, 2)),
    Case("sd35", "diffusers", lin("linear", 9), dual),
    Case("cogview3", "diffusers", lin("linear", 12), around("linear", 4, eps=1e-5)),
    Case(
        "cogvideox",
        "diffusers",
        {**lin("linear", 6), **vectors("norm")},
        around("linear", 2, eps=1e-5),
    ),
    *(
        Case(
            spec,
            source,
            {**lin(projection, 4), **vectors(*norms, leaves=("weight",))},
            two_norms(projection, norms, act),
        )
        for spec, source, projection, norms, act in (
            ("lumina", "diffusers", "norm1.linear", DIFFUSERS_NORMS, F.silu),
            ("lumina", "lumina", DIT, NORMS, F.silu),
            ("z_image", "diffusers", "adaLN_modulation.0", NORMS, lambda c: c),
        )
    ),
    Case(
        "stable_audio",
        "stable_audio_tools",
        {"to_scale_shift_gate": (6 * C,), "pre_norm.gamma": (C,), "ff_norm.gamma": (C,)},
        stable_audio,
        {
            f"{TRUNK}.0.weight": (C, D),
            f"{TRUNK}.0.bias": (C,),
            f"{TRUNK}.2.weight": (6 * C, C),
            f"{TRUNK}.2.bias": (6 * C,),
        },
    ),
    Case("ada_rms_norm", "x_transformers", lin("to_gamma", 1, bias=False), rms_scaled("to_gamma")),
    Case("ada_rms_norm", "k_diffusion", lin("linear", 1, bias=False), rms_scaled("linear")),
    Case("diffusion_policy_film", "diffusion_policy", lin("cond_encoder.1", 1), policy_shift),
    Case(
        "diffusion_policy_film(cond_predict_scale=True)",
        "diffusion_policy",
        lin("cond_encoder.1", 2),
        policy,
    ),
    *(
        Case(spec, source, {"scale_shift_table": shape}, single(trunk), lin(trunk, 6))
        for spec, source, trunk, shape in (
            ("adaln_single", "pixart", "t_block.1", (6, C)),
            ("adaln_single", "diffusers", "adaln_single.linear", (6, C)),
            ("wan", "diffusers", "condition_embedder.time_proj", (1, 6, C)),
        )
    ),
]
by_case = pytest.mark.parametrize(
    "case", CASES, ids=[f"{case.spec}-{case.source}" for case in CASES]
)


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Parameters of a source; variances and counts are positive."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        key: torch.randn(shape, generator=generator, dtype=torch.float64)
        for key, shape in shapes.items()
    }
    return {
        key: value.abs() + 1 if "var" in key else value.long() if "tracked" in key else value
        for key, value in drawn.items()
    }


def build(case: Case):
    """The component at one place, or its bank of two where they share parameters."""
    site = Site(C, D)
    if case.shared:
        return create_bank(case.spec, dict.fromkeys(PLACES, site)).double().eval()
    return create(case.spec, site).double().eval()


def theirs_of(case: Case) -> dict[str, Tensor]:
    """The whole state dict of the source, with the names of the places where there are two."""
    if not case.shared:
        return draw(case.shapes, 0)
    state = draw(case.shared, 9)
    for number, place in enumerate(PLACES):
        state |= {f"{place}.{key}": value for key, value in draw(case.shapes, number).items()}
    return state


def outputs(case: Case, built) -> list[Tensor]:
    """What the component computes at each place."""
    x, c, sublayers = inputs(case)
    if not isinstance(built, Bank):
        return [built(x, c, *sublayers)]
    return [built[place].around(x, built(c)[place], *sublayers) for place in PLACES]


def inputs(case: Case):
    """Features, a condition, and as many sublayers as the formula has."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, C, generator=generator, dtype=torch.float64)
    c = torch.randn(2, D, generator=generator, dtype=torch.float64)
    component = condmod.configure(case.spec).component
    if "set" in component.kinds:
        c = torch.stack([c, c.cos(), c.sin()], 1)
        c = {name: c + number for number, name in enumerate(component.sets)} or c
    probe = build(case)
    probe = probe[PLACES[0]] if isinstance(probe, Bank) else probe
    count = probe.parts if issubclass(component, condmod.SublayerModulator) else 0
    return x, c, [torch.tanh, torch.sin, torch.cos, torch.sigmoid][:count]


def wanted(case: Case, theirs: dict[str, Tensor]) -> list[Tensor]:
    """What the source's formula computes at each place."""
    x, c, sublayers = inputs(case)
    if not case.shared:
        return [case.formula(theirs, x, c, *sublayers)]
    return [
        case.formula(
            {key.removeprefix(f"{place}."): value for key, value in theirs.items()},
            x,
            c,
            *sublayers,
        )
        for place in PLACES
    ]


@by_case
def test_with_the_sources_parameters_ours_computes_the_sources_formula(case):
    built, theirs = build(case), theirs_of(case)
    built.load_state_dict(convert(built, case.source, theirs))
    for got, want in zip(outputs(case, built), wanted(case, theirs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@by_case
def test_there_and_back_is_bit_for_bit_the_same(case):
    built, theirs = build(case), theirs_of(case)
    ours = convert(built, case.source, theirs)
    back = convert(built, case.source, ours, inverse=True)
    assert back.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(back[key], value)
        assert back[key].dtype == value.dtype


# a block of the source has these keys itself; the others stand in a module of their own
BESIDE = {
    *(("ada_group_norm", "adm"), ("adaln", "dit"), ("adaln_zero", "dit"), ("mmdit", "sd3")),
    *(("lumina", "diffusers"), ("lumina", "lumina"), ("z_image", "diffusers")),
    *(("t5_film", "diffusers"), ("diffusion_policy_film", "diffusion_policy")),
}


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if not case.shared],
    ids=[f"{case.spec}-{case.source}" for case in CASES if not case.shared],
)
def test_in_a_model_the_keys_are_looked_for_where_the_source_has_them(case):
    model = torch.nn.ModuleDict({"place": build(case)})
    name = condmod.configure(case.spec).component.name
    prefix = "" if (name, case.source) in BESIDE else "place."
    theirs = {f"{prefix}{key}": value for key, value in theirs_of(case).items()}
    model.load_state_dict(convert(model, case.source, theirs))
    back = convert(model, case.source, model.state_dict(), inverse=True)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.items())


class Swapped:
    """A registry whose codecs have two kinds of shares change places."""

    def __init__(self, one: str, other: str) -> None:
        self.names = {one: other, other: one}

    def codecs(self, name):
        def change(layouts):
            return lambda config: [
                Layout(
                    layout.ours,
                    {key: [*map(self.other, names)] for key, names in layout.theirs.items()},
                )
                for layout in layouts(config)
            ]

        return [
            replace(c, layout=change(c.layout), joined=change(c.joined), shared=change(c.shared))
            for c in condmod.Registry().codecs(name)
        ]

    def other(self, share: str) -> str:
        first, *rest = share.split(" ")
        return " ".join([self.names.get(first, first), *rest])


SWAPS = dict.fromkeys(("lumina", "z_image"), ("scale", "gate"))
# one share, or a table that both keep alike: there is nothing to change places
ONE_SHARE = {"hunyuan_shift", GROUPS.format(False), "ada_rms_norm", "diffusion_policy_film"}
ONE_SHARE |= {"stable_audio", *ATTENTIONS}


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.spec not in ONE_SHARE],
    ids=[f"{case.spec}-{case.source}" for case in CASES if case.spec not in ONE_SHARE],
)
def test_shares_that_change_places_would_be_seen(case):
    built, theirs = build(case), theirs_of(case)
    swapped = Swapped(*SWAPS.get(case.spec, ("scale", "shift")))
    built.load_state_dict(convert(built, case.source, theirs, registry=swapped))
    for got, want in zip(outputs(case, built), wanted(case, theirs), strict=True):
        assert (got - want).abs().max() > 1e-2


@by_case
def test_another_familys_weights_are_refused_by_name(case):
    built = build(case)
    with pytest.raises(CodecError) as caught:
        convert(built, case.source, {"blocks.0.attn.qkv.weight": torch.zeros(3 * C, C)})
    assert condmod.configure(case.spec).component.name in str(caught.value)
    assert "unknown: blocks.0.attn.qkv.weight" in str(caught.value)
    for key in theirs_of(case):
        optional = key.endswith("num_batches_tracked")  # torch fills it in
        assert (key in str(caught.value)) is not optional


def test_every_codec_has_a_case():
    known = {
        (name, source) for name in list_modulators() for source in condmod.describe(name).sources
    }
    known -= {(name, source) for name, source in known if name == "flux"}  # an alias of mmdit
    tried = {(condmod.configure(case.spec).component.name, case.source) for case in CASES}
    assert tried | {("adaln_zero", "diffusers")} == known
    assert {"textbook", "edge", "dit", "adm", "diffusers", "pixart", "film"} <= {
        s for _, s in known
    }


def test_a_bank_joins_what_the_source_keeps_in_one_parameter():
    bank = create_bank("film_block", {"0": Site(C, D), "1": Site(C, D)}).double().eval()
    theirs = draw({"decoder_linear.weight": (4 * C, D), "decoder_linear.bias": (4 * C,)}, 0)
    for place in ("0", "1"):
        theirs |= {f"{place}.{key}": value for key, value in draw(BN, int(place)).items()}
    bank.load_state_dict(convert(bank, "film", theirs))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, C, generator=generator, dtype=torch.float64)
    c = torch.randn(2, D, generator=generator, dtype=torch.float64)
    for number, place in enumerate(("0", "1")):
        own = {key.removeprefix(f"{place}."): value for key, value in theirs.items()}
        for leaf in ("weight", "bias"):
            own[f"decoder_linear.{leaf}"] = theirs[f"decoder_linear.{leaf}"].chunk(2)[number]
        got = bank[place].around(x, bank(c)[place], torch.tanh)
        torch.testing.assert_close(got, film_block(own, x, c, torch.tanh), rtol=0, atol=1e-12)
    back = convert(bank, "film", bank.state_dict(), inverse=True)
    assert all(torch.equal(back[key], value) for key, value in theirs.items())


def test_a_checkpoint_from_before_batches_were_counted_loads():
    block = create("film_block", features=C, condition_dim=D)
    old = draw({**lin("decoder_linear", 2), **BN}, 0)
    del old["bn1.num_batches_tracked"]
    block.load_state_dict(convert(block, "film", old))
    assert torch.equal(block.norm.running_var, old["bn1.running_var"].float())
