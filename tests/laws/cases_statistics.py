"""The table of norms whose statistics span positions or samples, and of EDM2's modulation."""

import torch
import torch.nn.functional as F
from cases_affine import FIRST, LAST, back, channels_last, naive

from condmod import Site
from condmod.functional import ScaleShift
from condmod.testing import ModulatorCase

SEVERAL = ((2,), (5,), (2, 3), (2, 3, 2))


def standardised(x, dims, eps=1e-5, *, unbiased=False):
    """In channels-last words: over dims, of which each element counts alike."""
    mean = x.mean(dims, keepdim=True)
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    var = ((x - mean) ** 2).sum(dims, keepdim=True) / (count - unbiased)
    return (x - mean) / (var + eps).sqrt(), mean, (var + eps).sqrt()


def positions(x):
    return tuple(range(1, x.ndim - 1))


def samples(x):
    return tuple(range(x.ndim - 1))


# --- adain ------------------------------------------------------------------------------------


def style(site):
    def make(batch, places, dtype):
        draw = torch.Generator().manual_seed(2)
        value = torch.randn(batch, 3, 2, site.features, generator=draw, dtype=torch.float64)
        return (value.movedim(-1, 1) if site.channel_dim == 1 else value).to(dtype)

    return make


def adain(site):
    def reference(state, x, condition):
        x, c = channels_last(site, x), channels_last(site, condition)
        h, _, _ = standardised(x, positions(x), unbiased=True)
        _, mean, spread = standardised(c, (1, 2), unbiased=True)
        shape = (len(x), *[1] * (x.ndim - 2), site.features)
        return back(site, h * spread.reshape(shape) + mean.reshape(shape))

    return reference


# --- norms ------------------------------------------------------------------------------------


def instance(multiplier):
    def formula(x, parts, state):
        gamma, beta = parts.chunk(2, -1)
        return multiplier(gamma) * standardised(x, positions(x))[0] + beta

    return formula


def batch(multiplier):
    def formula(x, parts, state):
        gamma, beta = parts.chunk(2, -1)
        return multiplier(gamma) * standardised(x, samples(x))[0] + beta

    return formula


def raw(gamma):
    return gamma


def one_plus(gamma):
    return 1 + gamma


def linear_without_bias(site, formula):
    def reference(state, x, condition):
        blank = torch.zeros(len(state["proj.weight"]), dtype=torch.float64)
        return naive(site, formula)({**state, "proj.bias": blank}, x, condition)

    return reference


def ids(batch, places, dtype):
    draw = torch.Generator().manual_seed(2)
    return torch.randint(0, 10, (batch, *places), generator=draw)


def of_class(site, formula):
    def reference(state, x, condition):
        x = channels_last(site, x)
        rows = torch.stack([state["table"][int(one)] for one in condition.flatten()])
        rows = rows.reshape(*condition.shape, *[1] * (x.ndim - 1 - condition.ndim), -1)
        return back(site, formula(x, rows, state))

    return reference


def modern(site):
    def formula(x, c, state):
        h = (c @ state["hidden.weight"].T + state["hidden.bias"]).clamp(min=0)
        for_weight, for_bias = h.chunk(2, -1)
        weight = state["weight"] + for_weight @ state["delta_weight.weight"].T
        bias = state["bias"] + for_bias @ state["delta_bias.weight"].T
        return weight * (x - state["running_mean"]) / (state["running_var"] + 1e-5).sqrt() + bias

    return naive(site, formula)


def edm2(x, c, state):
    weight = state["weight"]
    rms = (weight**2).mean(1, keepdim=True).sqrt()
    unit = weight / (rms + 1e-4) / weight.shape[1] ** 0.5
    z = x * (1 + state["gain"] * (c @ unit.T))
    return z / (1 + (-z).exp()) / 0.596


def group_norm_of_sum(x, parts, state):
    h = x + parts
    batch, channels = h.shape[0], h.shape[-1]
    grouped = h.reshape(batch, -1, 3, channels // 3)
    normed = standardised(grouped, (1, 3))[0].reshape(h.shape)
    return normed * state["norm.weight"] + state["norm.bias"]


# --- what a pass gives at scale 1, shift 0 ----------------------------------------------------


def first(site, x):
    return x.movedim(site.channel_dim, 1).contiguous()


def instance_norm_neutral(site):
    def neutral(module, x):
        return F.group_norm(first(site, x), site.features).movedim(1, site.channel_dim)

    return neutral


def group_norm_neutral(site):
    def neutral(module, x):
        y = F.group_norm(x.movedim(site.channel_dim, 1), 3, module.norm.weight, module.norm.bias)
        return y.movedim(1, site.channel_dim)

    return neutral


def batch_norm_neutral(site):
    def neutral(module, x):
        y = F.batch_norm(first(site, x), None, None, training=True)
        return y.movedim(1, site.channel_dim)

    return neutral


def unchanged(module, x):
    nothing = torch.zeros(len(x), module.site.features)
    return module.modulate(x, ScaleShift(nothing, nothing))


def cases(site):
    raw_site = Site(site.features, channel_dim=site.channel_dim, name=site.name)
    map_site = Site(site.features, site.features, site.channel_dim, name=site.name)
    instance_neutral = instance_norm_neutral(site)
    yield ModulatorCase(
        "adain", map_site, adain(map_site), positions=SEVERAL, condition=style(map_site)
    )
    yield ModulatorCase(
        "adain1d",
        site,
        naive(site, instance(one_plus)),
        positions=SEVERAL,
        neutral=instance_neutral,
    )
    yield ModulatorCase(
        "conditional_instance_norm(classes=10)",
        raw_site,
        of_class(raw_site, instance(raw)),
        positions=SEVERAL,
        condition=ids,
        neutral=instance_neutral,
    )
    yield ModulatorCase(
        "conditional_batch_norm(classes=10)",
        raw_site,
        of_class(raw_site, batch(raw)),
        positions=SEVERAL,
        condition=ids,
        neutral=batch_norm_neutral(site),
    )
    yield ModulatorCase(
        "biggan_batch_norm",
        site,
        linear_without_bias(site, batch(one_plus)),
        positions=SEVERAL,
        neutral=batch_norm_neutral(site),
    )
    yield ModulatorCase("modern_batch_norm(hidden=5)", site, modern(site), neutral=unchanged)
    yield ModulatorCase("edm2", site, naive(site, edm2))
    yield ModulatorCase(
        "ada_group_norm(groups=3, use_scale_shift_norm=False)",
        site,
        naive(site, group_norm_of_sum, F.silu),
        neutral=group_norm_neutral(site),
    )


CASES = [case for site in (LAST, FIRST) for case in cases(site)]
