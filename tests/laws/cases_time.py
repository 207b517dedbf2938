"""The table of mechanisms that run along time."""

import torch
from cases_affine import FIRST, LAST, back, channels_last, naive
from torch import nn

from condmod import Site
from condmod.testing import ModulatorCase


class Gated(ModulatorCase):
    """A case whose component gives half of what its sublayer gives."""

    def output(self, x):
        return x


class Doubling(nn.Module):
    """Twice the channels, as the convolution in front of a gate."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, h):
        return torch.cat([h.sin(), 2 * h], self.dim)


# --- wavenet_gate -----------------------------------------------------------------------------


def wavenet_gate(x, parts, state, sublayer):
    a, b = (torch.cat([x.sin(), 2 * x], -1) + parts).chunk(2, -1)
    return a.tanh() / (1 + (-b).exp())


def wavenet_gate_neutral(site):
    def neutral(module, x, sublayer):
        a, b = sublayer(x).chunk(2, site.channel_dim)
        return a.tanh() * b.sigmoid()

    return neutral


# --- by blocks --------------------------------------------------------------------------------

LENGTHS = ((5,), (1,), (2,), (6,), (7,))


def lstm(state, prefix, steps):
    """Every hidden state of (B, n, I), one step after the other."""
    w, u = state[f"{prefix}weight_ih_l0"], state[f"{prefix}weight_hh_l0"]
    bias = state[f"{prefix}bias_ih_l0"] + state[f"{prefix}bias_hh_l0"]
    h = c = torch.zeros(len(steps), u.shape[1], dtype=torch.float64)
    out = []
    for one in steps.unbind(1):
        i, f, g, o = (one @ w.T + h @ u.T + bias).chunk(4, -1)
        c = c / (1 + (-f).exp()) + g.tanh() / (1 + (-i).exp())
        h = c.tanh() / (1 + (-o).exp())
        out.append(h)
    return torch.stack(out, 1)


def blocks_of(x, size, fill):
    """(B, T, C), filled up to whole blocks, as a list of blocks."""
    rest = -x.shape[1] % size
    filler = torch.full((len(x), rest, x.shape[2]), fill, dtype=x.dtype)
    return torch.cat([x, filler], 1).split(size, 1)


def by_blocks(site, size, generator):
    """A reference: (γ, β) of each position by generator(state, maxima of blocks, condition)."""

    def reference(state, x, condition):
        x = channels_last(site, x)
        pooled = torch.stack([one.amax(1) for one in blocks_of(x, size, 0.0)], 1)
        gamma, beta = generator(state, pooled, condition)
        position = torch.arange(x.shape[1]) // size
        return back(site, gamma[:, position] * x + beta[:, position])

    return reference


def tfilm(state, pooled, condition):
    gamma = lstm(state, "lstm.", pooled)
    return gamma, torch.zeros_like(gamma)


def tfilm_shift(state, pooled, condition):
    return lstm(state, "lstm.", pooled).chunk(2, -1)


def conditional_tfilm(state, pooled, condition):
    held = condition[:, None].expand(-1, pooled.shape[1], -1)
    return lstm(state, "lstm.", torch.cat([pooled, held], -1)).chunk(2, -1)


def tiny_tfilm(state, pooled, condition):
    h = pooled @ state["conv.weight"].T + state["conv.bias"]
    h = lstm(state, "lstm.", h)
    for layer in ("adaptor.0", "adaptor.2", "adaptor.4"):
        h = (h @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]).clamp(min=0)
    return h.chunk(2, -1)


def tvfilm(site, size):
    def reference(state, x, condition):
        x, c = channels_last(site, x), channels_last(site, condition)
        pooled = torch.stack([one.amax(1) for one in blocks_of(c, size, -torch.inf)], 1)
        h = lstm(state, "bank.shared.lstm.", pooled)
        own = "bank.modulators.here.proj"
        gamma, beta = (h @ state[f"{own}.weight"].T + state[f"{own}.bias"]).chunk(2, -1)
        position = torch.arange(x.shape[1]) // size
        return back(site, gamma[:, position] * x + beta[:, position])

    return reference


# --- gpocm ------------------------------------------------------------------------------------


def gpocm(site):
    def reference(state, x, condition):
        x = channels_last(site, x)
        channels = x.shape[-1]
        parts = condition @ state["proj.weight"].T + state["proj.bias"]
        out = []
        for one, row in zip(x, parts, strict=True):
            mix = row[: channels**2].reshape(channels, channels)
            out.append(one / (1 + (-(one @ mix + row[channels**2 :])).exp()))
        return back(site, torch.stack(out))

    return reference


def cases(site):
    alone = Site(site.features, channel_dim=site.channel_dim, name=site.name)
    yield Gated(
        "wavenet_gate",
        site,
        naive(site, wavenet_gate),
        sublayer=lambda: Doubling(site.channel_dim),
        neutral=wavenet_gate_neutral(site),
    )
    yield ModulatorCase("tfilm(block=2)", alone, by_blocks(alone, 2, tfilm), positions=LENGTHS)
    yield ModulatorCase(
        "tfilm(block=2, shift=True)", alone, by_blocks(alone, 2, tfilm_shift), positions=LENGTHS
    )
    yield ModulatorCase(
        "conditional_tfilm(block=2)",
        site,
        by_blocks(site, 2, conditional_tfilm),
        positions=LENGTHS,
    )
    yield ModulatorCase(
        "tiny_tfilm(block=2)", alone, by_blocks(alone, 2, tiny_tfilm), positions=LENGTHS
    )
    yield ModulatorCase("tvfilm(block=2, width=5)", site, tvfilm(site, 2), positions=LENGTHS)
    yield ModulatorCase("gpocm", site, gpocm(site))


CASES = [case for site in (LAST, FIRST) for case in cases(site)]
