"""The table of mechanisms that read a map of any resolution."""

import itertools

import torch
import torch.nn.functional as F
from cases_affine import FIRST, LAST, back, channels_last

from condmod.testing import ModulatorCase

SEQUENCES = ((2,), (5,), (7,))
IMAGES = ((1, 2), (4, 6), (3, 3))
VOLUMES = ((2, 1, 2), (3, 2, 4))
SIDES = {1: (3,), 2: (3, 2), 3: (2, 3, 2)}


def a_map(site, rank):
    def make(batch, places, dtype):
        draw = torch.Generator().manual_seed(2)
        shape = (batch, *SIDES[rank], site.condition_dim)
        value = torch.randn(shape, generator=draw, dtype=torch.float64)
        return (value.movedim(-1, 1) if site.channel_dim == 1 else value).to(dtype)

    return make


def nearest(held, sides):
    """Channels last: position i of n reads position i·m // n of m."""
    for dim, n in enumerate(sides, 1):
        m = held.shape[dim]
        held = held.index_select(dim, torch.arange(n) * m // n)
    return held


def convolved(h, weight, bias):
    """Channels last, zeros beyond the border: a sum over the kernel's offsets."""
    kernel, sides = weight.shape[2:], h.shape[1:-1]
    margins = [half for side in reversed(kernel) for half in (side // 2, side // 2)]
    padded = F.pad(h, (0, 0, *margins))
    total = bias
    for offset in itertools.product(*(range(side) for side in kernel)):
        window = padded
        for dim, (start, length) in enumerate(zip(offset, sides, strict=True), 1):
            window = window.narrow(dim, start, length)
        total = total + window @ weight[(..., *offset)].T
    return total


def normed(x, dims, eps=1e-5):
    mean = x.mean(dims, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dims, keepdim=True) + eps).sqrt()


def grouped(x, groups, eps=1e-5):
    split = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    return normed(split, (1, 3), eps).reshape(x.shape)


def norm_of(kind, x):
    inside = tuple(range(1, x.ndim - 1))
    if kind == "group":
        return grouped(x, 3)
    dims = {"batch": (0, *inside), "instance": inside, "layer": (-1,)}
    return x if kind == "none" else normed(x, dims[kind])


def spade(site, kind):
    def reference(state, x, condition):
        x = channels_last(site, x)
        at = nearest(channels_last(site, condition), x.shape[1:-1])
        h = convolved(at, state["hidden.weight"], state["hidden.bias"]).clamp(min=0)
        gamma, beta = (
            convolved(h, state[f"{key}.weight"], state[f"{key}.bias"]) for key in ("scale", "shift")
        )
        return back(site, (1 + gamma) * norm_of(kind, x) + beta)

    return reference


def spade_neutral(module, x):
    return x if module.norm is None else module.norm(x)


def spatial_norm(site):
    def reference(state, x, condition):
        x = channels_last(site, x)
        z = nearest(channels_last(site, condition), x.shape[1:-1])
        y, b = (z @ state["proj.weight"].T + state["proj.bias"]).chunk(2, -1)
        h = grouped(x, 3, 1e-6) * state["norm.weight"] + state["norm.bias"]
        return back(site, y * h + b)

    return reference


def cases(site):
    for options, kind, rank, positions in (
        ("hidden=5", "batch", 2, IMAGES),
        ("norm='instance', hidden=5, spatial_dims=1", "instance", 1, SEQUENCES),
        ("norm='layer', hidden=5, spatial_dims=3, kernel=1", "layer", 3, VOLUMES),
        ("norm='group', groups=3, hidden=5, spatial_dims=1, kernel=5", "group", 1, SEQUENCES),
        ("norm='none', hidden=5", "none", 2, IMAGES),
    ):
        yield ModulatorCase(
            f"spade({options})",
            site,
            spade(site, kind),
            positions=positions,
            condition=a_map(site, rank),
            neutral=spade_neutral,
        )
    yield ModulatorCase(
        "spatial_norm(groups=3)",
        site,
        spatial_norm(site),
        positions=IMAGES,
        condition=a_map(site, 2),
        neutral=lambda module, x: module.norm(x),
    )


CASES = [case for site in (LAST, FIRST) for case in cases(site)]
