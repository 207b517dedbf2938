"""The rest of the FiLM family, each with a naive float64 reference written from the formula."""

import torch
import torch.nn.functional as F
from cases_affine import FIRST, LAST, back, channels_last, naive

from condmod.testing import ModulatorCase

SEVERAL = ((2,), (5,), (2, 3), (2, 3, 2))  # batch norm averages over more than one element


def affine(multiplier=lambda s: 1 + s):
    def formula(x, parts, state):
        scale, shift = parts.chunk(2, -1)
        return multiplier(scale) * x + shift

    return formula


def raw(s):
    return s


def batch_norm(x):
    flat = x.reshape(-1, x.shape[-1])
    mean = flat.mean(0)
    return (x - mean) / ((flat - mean) ** 2).mean(0).add(1e-5).sqrt()


def batch_normed(site, multiplier=raw):
    inner = affine(multiplier)
    return naive(site, lambda x, parts, state: inner(batch_norm(x), parts, state))


def film_block(site, multiplier):
    def formula(x, parts, state, sublayer):
        y = affine(multiplier)(batch_norm(sublayer(x)), parts, state)
        return x + y * (y > 0)

    return naive(site, formula)


def batch_norm_neutral(site):
    def neutral(module, x):
        first = x.movedim(site.channel_dim, 1).contiguous()
        return F.batch_norm(first, None, None, training=True).movedim(1, site.channel_dim)

    return neutral


def film_block_neutral(site):
    normed = batch_norm_neutral(site)
    return lambda module, x, sublayer: x + normed(module, sublayer(x)).relu()


def t5_film(x, parts, state):
    scale, shift = parts.chunk(2, -1)
    rms = (x**2).mean(-1, keepdim=True).add(1e-6).sqrt()
    return x / rms * state["norm.weight"] * (1 + scale) + shift


def t5_film_reference(site):
    def reference(state, x, condition):
        silent = torch.zeros(2 * site.features, dtype=x.dtype)
        return naive(site, t5_film)({**state, "proj.bias": silent}, x, condition)

    return reference


def t5_film_neutral(site):
    def neutral(module, x):
        last = x.movedim(site.channel_dim, -1)
        y = F.rms_norm(last, (site.features,), module.norm.weight, 1e-6)
        return y.movedim(-1, site.channel_dim)

    return neutral


def shift_alone(x, parts, state):
    return x + parts


def gnn_film(act):
    def formula(x, parts, state):
        beta, gamma = parts.chunk(2, -1)
        return act(gamma * x + beta)

    return formula


def layer(state, name, h):
    return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def cnaps(site):
    def reference(state, x, z):
        z = torch.relu(layer(state, "bank.shared.layer", z))
        prefix = next(key for key in state if key.endswith("scale_rho")).removesuffix("scale_rho")
        generated = []
        for name in ("scale", "shift"):
            h = z + layer(state, f"{prefix}{name}.0", z)
            for number in (1, 2):
                h = torch.relu(h)
                h = h + layer(state, f"{prefix}{name}.{number}", h)
            h = state[f"{prefix}{name}_rho"] * h
            generated.append(h.reshape(len(h), *[1] * (x.ndim - 2), -1))
        gamma, beta = generated
        return back(site, (1 + gamma) * channels_last(site, x) + beta)

    return reference


def cft(site, strength):
    def reference(state, x, condition):
        x, c = channels_last(site, x), channels_last(site, condition)
        generated = []
        for name in ("scale", "shift"):
            h = layer(state, f"{name}.0", c)
            generated.append(layer(state, f"{name}.2", torch.where(h > 0, h, 0.2 * h)))
        scale, shift = generated
        return back(site, x + strength * (scale * x + shift))

    return reference


def family(site):
    forms = {"film_block": lambda s: 1 + s, "film_block(scale='sigmoid')": torch.sigmoid}
    for spec, form in forms.items():
        yield ModulatorCase(
            spec,
            site,
            film_block(site, form),
            positions=SEVERAL,
            neutral=film_block_neutral(site),
        )
    yield ModulatorCase("rt1_film", site, naive(site, affine()))
    yield ModulatorCase("diffusion_policy_film", site, naive(site, shift_alone, F.mish))
    yield ModulatorCase(
        "diffusion_policy_film(cond_predict_scale=True)", site, naive(site, affine(raw), F.mish)
    )
    yield ModulatorCase("t5_film", site, t5_film_reference(site), neutral=t5_film_neutral(site))
    yield ModulatorCase(
        "audio_film",
        site,
        batch_normed(site),
        positions=SEVERAL,
        neutral=batch_norm_neutral(site),
    )
    yield ModulatorCase("audio_film(batch_norm=False)", site, naive(site, affine(raw)))
    yield ModulatorCase("cnaps", site, cnaps(site))
    yield ModulatorCase(
        "cft(strength=0.75)", site, cft(site, 0.75), positions=((1,), (2,), (5,), (2, 3), (2, 3, 2))
    )
    yield ModulatorCase(
        "gnn_film",
        site,
        naive(site, gnn_film(torch.relu)),
        neutral=lambda module, x: x.relu(),
    )
    yield ModulatorCase("gnn_film(activation='none')", site, naive(site, gnn_film(raw)))


CASES = [case for site in (LAST, FIRST) for case in family(site)]
