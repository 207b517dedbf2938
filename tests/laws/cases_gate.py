"""The table of gates and side paths."""

import torch
from cases_affine import FIRST, LAST, add, back, channels_last, naive

from condmod import Site
from condmod.testing import ModulatorCase


def squeeze_excite(site, act, gate):
    def reference(state, x, condition):
        x = channels_last(site, x)
        mean = x
        for _ in range(x.ndim - 2):
            mean = mean.mean(1)
        h = act(mean @ state["reduce.weight"].T + state["reduce.bias"])
        factor = gate(h @ state["expand.weight"].T + state["expand.bias"])
        return back(site, x * factor.reshape(len(x), *[1] * (x.ndim - 2), -1))

    return reference


def relu(h):
    return h.clamp(min=0)


def silu(h):
    return h / (1 + (-h).exp())


def hard_sigmoid(h):
    return (h / 6 + 0.5).clamp(0, 1)


def tanh_gate(site):
    def reference(state, x, condition, sublayer):
        x = channels_last(site, x)
        return back(site, x + state["alpha"].tanh() * sublayer(x))

    return reference


def tanh_gate_attached(site):
    def reference(state, x, condition, sublayer):
        return back(site, (1 + state["alpha"].tanh()) * sublayer(channels_last(site, x)))

    return reference


def cases(site):
    alone = Site(site.features, channel_dim=site.channel_dim, name=site.name)
    yield ModulatorCase("squeeze_excite", alone, squeeze_excite(site, relu, torch.sigmoid))
    yield ModulatorCase(
        "squeeze_excite(ratio=0.5, divisor=1, activation='silu', gate='hard_sigmoid')",
        alone,
        squeeze_excite(site, silu, hard_sigmoid),
    )
    yield ModulatorCase("tanh_gate", alone, tanh_gate(site))
    yield ModulatorCase(
        "tanh_gate(per_channel=True, residual=False, gate='one_plus_tanh')",
        alone,
        tanh_gate_attached(site),
    )
    places = ((1,), (2,), (5,), (2, 3), (2, 3, 2))
    yield ModulatorCase("zero_conv", site, naive(site, add), positions=places)


CASES = [case for site in (LAST, FIRST) for case in cases(site)]
