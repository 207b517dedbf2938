"""The table of modulators: spec, site, and a naive float64 reference written from the formula."""

import torch
import torch.nn.functional as F

from condmod import Site
from condmod.testing import ModulatorCase

LAST = Site(6, 4, name="blocks.0.mlp")
FIRST = Site(6, 4, channel_dim=1, name="blocks.0.conv")


def channels_last(site, x):
    return x.movedim(1, -1) if site.channel_dim == 1 else x


def back(site, y):
    return y.movedim(-1, 1) if site.channel_dim == 1 else y


def same(c):
    return c


def naive(site, formula, act=same, **generator):
    """A reference in channels-last words: formula(x, parts, state)."""

    def reference(state, x, condition, *sublayers):
        c = condition
        if c.ndim > 2 and site.channel_dim == 1:
            c = c.movedim(1, -1)
        for layer, act_hidden in generator.get("hidden", ()):
            c = act_hidden(c @ state[f"{layer}.weight"].T + state[f"{layer}.bias"])
        if "proj.weight" in state:
            c = act(c) @ state["proj.weight"].T + state["proj.bias"]
        c = c.reshape(c.shape[0], *[1] * (x.ndim - c.ndim), *c.shape[1:])
        return back(site, formula(channels_last(site, x), c, state, *sublayers))

    return reference


def film(multiplier):
    def formula(x, parts, state):
        gamma, beta = parts.chunk(2, -1)
        return multiplier(gamma) * x + beta

    return formula


def layer_norm(x):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(1e-6).sqrt()


def adaln_zero(x, parts, state, *sublayers):
    chunks = parts.chunk(3 * len(sublayers), -1)
    for i, sublayer in enumerate(sublayers):
        shift, scale, gate = chunks[3 * i : 3 * i + 3]
        x = x + gate * sublayer(layer_norm(x) * (1 + scale) + shift)
    return x


def adaln_zero_attached(x, parts, state, sublayer):
    shift, scale, gate = parts.chunk(3, -1)
    return (1 + gate) * sublayer(x * (1 + scale) + shift)


def adaln_zero_neutral(site):
    def neutral(module, x, *sublayers):
        dim = site.channel_dim
        for sublayer in sublayers:
            h = F.layer_norm(x.movedim(dim, -1), (site.features,), eps=1e-6).movedim(-1, dim)
            x = x + sublayer(h)
        return x

    return neutral


def ada_group_norm(groups):
    def formula(x, parts, state):
        scale, shift = parts.chunk(2, -1)
        batch, channels = x.shape[0], x.shape[-1]
        grouped = x.reshape(batch, -1, groups, channels // groups)
        mean = grouped.mean((1, 3), keepdim=True)
        var = ((grouped - mean) ** 2).mean((1, 3), keepdim=True)
        h = ((grouped - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
        h = h * state["norm.weight"] + state["norm.bias"]
        return (1 + scale) * h + shift

    return formula


def group_norm_neutral(site):
    def neutral(module, x):
        first = x.movedim(site.channel_dim, 1).contiguous()
        y = F.group_norm(first, module.norm.groups, module.norm.weight, module.norm.bias)
        return y.movedim(1, site.channel_dim)

    return neutral


def add(x, parts, state):
    return x + parts


def concat_project(site):
    def reference(state, x, condition):
        x = channels_last(site, x)
        c = condition.movedim(1, -1) if condition.ndim > 2 and site.channel_dim == 1 else condition
        c = c.reshape(c.shape[0], *[1] * (x.ndim - c.ndim), *c.shape[1:])
        joined = torch.cat([x, c.expand(*x.shape[:-1], c.shape[-1])], -1)
        return back(site, joined @ state["proj.weight"].T + state["proj.bias"])

    return reference


def film_family(site):
    one_plus = film(lambda s: 1 + s)
    yield ModulatorCase("film", site, naive(site, film(same)))
    forms = {"one_plus": lambda s: 1 + s, "sigmoid": torch.sigmoid, "exp": torch.exp}
    forms["one_plus_tanh"] = lambda s: 1 + s.tanh()
    for form, multiplier in forms.items():
        yield ModulatorCase(f"film(scale='{form}')", site, naive(site, film(multiplier)))
    yield ModulatorCase(
        "film(hidden=[5, 3])",
        site,
        naive(site, film(same), hidden=(("hidden.0", F.silu), ("hidden.2", F.silu))),
    )
    yield ModulatorCase("dense_film", site, naive(site, one_plus, F.mish))
    yield ModulatorCase(
        "dense_film(residual=True)",
        site,
        naive(site, lambda x, parts, state: x + one_plus(x, parts, state), F.mish),
    )
    yield ModulatorCase(
        "dense_film(scale='exp', init='xavier')", site, naive(site, film(torch.exp), F.mish)
    )

    def with_hidden(state, x, condition):
        inner = naive(site, one_plus, F.mish)
        c = condition.movedim(1, -1) if condition.ndim > 2 and site.channel_dim == 1 else condition
        c = F.mish(c) @ state["hidden.1.weight"].T + state["hidden.1.bias"]
        c = c.movedim(-1, 1) if c.ndim > 2 and site.channel_dim == 1 else c
        return inner(state, x, c)

    yield ModulatorCase("dense_film(hidden=[5])", site, with_hidden)


def norm_family(site):
    for parts in (1, 2):
        yield ModulatorCase(
            f"adaln_zero(parts={parts})",
            site,
            naive(site, adaln_zero, F.silu),
            neutral=adaln_zero_neutral(site),
        )
    yield ModulatorCase(
        "adaln_zero(parts=1, norm='none', residual=False, gate='one_plus')",
        site,
        naive(site, adaln_zero_attached, F.silu),
        neutral=lambda module, x, sublayer: sublayer(x),
    )
    yield ModulatorCase(
        "ada_group_norm(groups=3)",
        site,
        naive(site, ada_group_norm(3), F.silu),
        neutral=group_norm_neutral(site),
    )


def baselines(site):
    yield ModulatorCase("none", site, lambda state, x, condition: x)
    yield ModulatorCase("add", site, naive(site, add))
    yield ModulatorCase("add(activation='silu')", site, naive(site, add, F.silu))
    yield ModulatorCase("concat_project", site, concat_project(site))


CASES = [
    case
    for site in (LAST, FIRST)
    for family in (film_family, norm_family, baselines)
    for case in family(site)
]
