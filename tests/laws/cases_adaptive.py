"""Adaptive norms and what stands around sublayers, each with a naive float64 reference."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases_affine import FIRST, LAST, back, channels_last

from condmod import Site
from condmod.testing import ModulatorCase

# A sigmoid or a tanh flattens a small move of the gate: to show it through the rounding to
# bfloat16, the law of precision needs more features than the last of the usual positions give.
MANY = ((), (1,), (2,), (5,), (2, 3), (8, 6, 4))


def layer_norm(x, eps):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(eps).sqrt()


def rms_norm(x, eps):
    return x / (x**2).mean(-1, keepdim=True).add(eps).sqrt()


def group_norm(x, groups, eps=1e-5):
    batch, channels = x.shape[0], x.shape[-1]
    grouped = x.reshape(batch, -1, groups, channels // groups)
    mean = grouped.mean((1, 3), keepdim=True)
    var = ((grouped - mean) ** 2).mean((1, 3), keepdim=True)
    return ((grouped - mean) / (var + eps).sqrt()).reshape(x.shape)


def spread(c, x):
    """A condition (B, D) as one that broadcasts over the positions of channels-last features."""
    return c.reshape(c.shape[0], *[1] * (x.ndim - c.ndim), *c.shape[1:])


def linear(state, name, c):
    return c @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def naive(site, formula):
    """A reference in channels-last words: formula(x, c, state, *sublayers)."""

    def reference(state, x, condition, *sublayers):
        aligned = condition.ndim > 2 and site.channel_dim == 1
        c = condition.movedim(1, -1) if aligned else condition
        x = channels_last(site, x)
        return back(site, formula(x, spread(c, x), state, *sublayers))

    return reference


def normed(site, norm):
    """What a norm alone gives, in torch's own words: norm(module, x), channels last."""

    def neutral(module, x):
        return back(site, norm(module, channels_last(site, x)))

    return neutral


def torch_norm(module, x):
    norm = module.norm
    if norm.kind == "rms":
        return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)
    return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)


def torch_group_norm(module, x):
    first = x.movedim(-1, 1).contiguous()
    return F.group_norm(first, module.norm.groups, eps=module.norm.eps).movedim(1, -1)


def adaln(x, c, state):
    shift, scale = linear(state, "proj", F.silu(c)).chunk(2, -1)
    return layer_norm(x, 1e-6) * (1 + scale) + shift


def adaln_of_affine_rms(x, c, state):
    scale, shift = linear(state, "proj", F.silu(c)).chunk(2, -1)
    return rms_norm(x, 1e-5) * state["norm.weight"] * (1 + scale) + shift


def adaln_without_shift_and_biases(x, c, state):
    scale = F.silu(c) @ state["proj.weight"].T
    return layer_norm(x, 1e-6) * state["norm.weight"] * (1 + scale)


def ada_rms_norm(x, c, state):
    return rms_norm(x, 1e-6) * (1 + c @ state["proj.weight"].T)


def ada_rms_norm_of_layer(x, c, state):
    return layer_norm(x, 1e-5) * (1 + c @ state["proj.weight"].T)


def hunyuan_shift(x, c, state):
    h = layer_norm(x, 1e-6) * state["norm.weight"] + state["norm.bias"]
    return h + linear(state, "proj", F.silu(c))


def ada_group_norm(act):
    def formula(x, c, state):
        scale, shift = linear(state, "proj", act(c)).chunk(2, -1)
        return group_norm(x, 3) * (1 + scale) + shift

    return formula


def norm_family(site):
    yield ModulatorCase("adaln", site, naive(site, adaln), neutral=normed(site, torch_norm))
    yield ModulatorCase(
        "adaln(order='scale_shift', norm='rms', affine=True, eps=1e-5)",
        site,
        naive(site, adaln_of_affine_rms),
        neutral=normed(site, torch_norm),
    )
    yield ModulatorCase(
        "adaln(order='scale', affine=True, bias=False)",
        site,
        naive(site, adaln_without_shift_and_biases),
        neutral=normed(site, torch_norm),
    )
    yield ModulatorCase("ada_rms_norm", site, naive(site, ada_rms_norm))
    yield ModulatorCase(
        "ada_rms_norm(norm='layer', eps=1e-5)", site, naive(site, ada_rms_norm_of_layer)
    )
    yield ModulatorCase(
        "hunyuan_shift", site, naive(site, hunyuan_shift), neutral=normed(site, torch_norm)
    )
    yield ModulatorCase(
        "ada_group_norm_diffusers(groups=3, activation='silu')",
        site,
        naive(site, ada_group_norm(F.silu)),
        neutral=normed(site, torch_group_norm),
    )
    yield ModulatorCase(
        "ada_group_norm_k_diffusion(group_size=2)", site, naive(site, ada_group_norm(lambda c: c))
    )


@dataclass(frozen=True, eq=False)
class NamedCase(ModulatorCase):
    """Conditions by name, each with its width where x has C."""

    def repeat(self, condition, positions):
        repeated = super().repeat(condition, positions)
        return {
            name: value.movedim(-1, 1) if self.site.channel_dim == 1 else value
            for name, value in repeated.items()
        }


def named(site, maps, **widths):
    """A vector for each name; for those of `maps` one per position, where there are any."""

    def condition(batch, positions, dtype):
        made = {}
        for seed, (name, width) in enumerate(widths.items()):
            place = positions if name in maps else ()
            draw = torch.Generator().manual_seed(seed)
            value = torch.randn(batch, *place, width, generator=draw, dtype=torch.float64)
            made[name] = (value.movedim(-1, 1) if place and site.channel_dim == 1 else value).to(
                dtype
            )
        return made

    return condition


def ace(site, norm, base):
    def reference(state, x, condition):
        x = channels_last(site, x)
        scale, shift = torch.full_like(x, base), torch.zeros_like(x)
        for name, value in condition.items():
            c = value.movedim(1, -1) if value.ndim > 2 and site.channel_dim == 1 else value
            parts = linear(state, f"proj.{name}", spread(c, x)).chunk(2, -1)
            scale, shift = scale + parts[0], shift + parts[1]
        return back(site, norm(x, state) * scale + shift)

    return reference


def ace_family(site):
    raw = Site(site.features, channel_dim=site.channel_dim, name=site.name)
    yield NamedCase(
        "ace_layer_norm(scalar=4, label=3, noise=2, position=5)",
        raw,
        ace(site, lambda x, state: layer_norm(x, 1e-5), 0),
        condition=named(site, {"noise", "position"}, scalar=4, label=3, noise=2, position=5),
    )
    yield NamedCase(
        "ace_layer_norm(noise=2, affine=True)",
        raw,
        ace(
            site,
            lambda x, state: layer_norm(x, 1e-5) * state["norm.weight"] + state["norm.bias"],
            1,
        ),
        condition=named(site, {"noise"}, noise=2),
    )
    yield NamedCase(
        "ace_layer_norm(label=3, global_norm=True)",
        raw,
        ace(site, lambda x, state: group_norm(x, 1), 1),
        condition=named(site, (), label=3),
    )


def af3_adaln(x, c, state, sublayer):
    normed = layer_norm(c, 1e-5) * state["condition_norm.weight"]
    scale, shift = linear(state, "scale", normed), normed @ state["shift.weight"].T
    y = sublayer(torch.sigmoid(scale) * layer_norm(x, 1e-5) + shift)
    return x + torch.sigmoid(linear(state, "gate", c)) * y


def adaptive_layer_scale(x, c, state, sublayer):
    return x + torch.sigmoid(linear(state, "proj", c)) * sublayer(x)


def pi05(x, c, state, sublayer):
    scale, shift, gate = linear(state, "proj", c).chunk(3, -1)
    return x + gate * sublayer(rms_norm(x, 1e-6) * (1 + scale) + shift)


def two_norms(act):
    def formula(x, c, state, *sublayers):
        chunks = linear(state, "proj", act(c)).chunk(2 * len(sublayers), -1)
        names = ("attention", "ffn")
        for part, sublayer in enumerate(sublayers):
            scale, gate = chunks[2 * part : 2 * part + 2]
            before, behind = (state[f"norms.{names[part]}_norm{place}.weight"] for place in (1, 2))
            y = sublayer(rms_norm(x, 1e-5) * before * (1 + scale))
            x = x + torch.tanh(gate) * rms_norm(y, 1e-5) * behind
        return x

    return formula


def pi05_neutral(site):
    def neutral(module, x, sublayer):
        h = back(site, F.rms_norm(channels_last(site, x), (site.features,), eps=1e-6))
        return x + sublayer(h)

    return neutral


def block_family(site):
    formulas = {
        "af3_adaln": af3_adaln,
        "adaptive_layer_scale": adaptive_layer_scale,
        "pi05": pi05,
        "lumina": two_norms(F.silu),
        "lumina(parts=1)": two_norms(F.silu),
        "z_image": two_norms(lambda c: c),
    }
    for spec, formula in formulas.items():
        neutral = pi05_neutral(site) if spec == "pi05" else None
        yield ModulatorCase(spec, site, naive(site, formula), MANY, neutral=neutral)


CASES = [
    case
    for site in (LAST, FIRST)
    for family in (norm_family, ace_family, block_family)
    for case in family(site)
]
