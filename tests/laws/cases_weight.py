"""The table of what modulates a layer's weight or adds to it, naively: a weight for each sample."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from condmod import Site
from condmod.testing import ModulatorCase

WIDE = Site(6, 4, out_features=8, name="blocks.0.mlp")
FIRST = Site(6, 4, channel_dim=1, out_features=8, name="blocks.0.conv")
SQUARE = Site(6, 4, channel_dim=1, name="blocks.0.conv")
MAPS = ((2, 3), (1, 1), (4, 3))
LINEAR = partial(nn.Linear, 6, 8)


def convolve(layer, x, weight):
    """What a layer makes of one sample with another weight, without its bias."""
    if isinstance(layer, nn.Linear):
        return x @ weight.T
    rank = weight.ndim - 2
    given = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    name = f"conv{'_transpose' if layer.transposed else ''}{rank}d"
    return getattr(F, name)(x[None], weight, groups=layer.groups, **given)[0]


def output_first(layer, weight):
    """A weight as (O, what an output channel reads, ...), and the way back."""
    if not getattr(layer, "transposed", False):
        return weight, lambda w: w
    groups = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2)
    return groups.flatten(
        0, 1
    ), lambda w: w.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)


def styled(layer, style, demodulate):
    """The weight of one sample."""
    weight, back = output_first(layer, layer.weight)
    reads = style.unflatten(0, (getattr(layer, "groups", 1), -1))
    reads = reads.repeat_interleave(len(weight) // len(reads), 0)
    weight = weight * reads.reshape(*reads.shape, *[1] * (weight.ndim - 2))
    if demodulate:
        norms = weight.flatten(1).square().sum(1) + 1e-8
        weight = weight / norms.sqrt().reshape(-1, *[1] * (weight.ndim - 1))
    return back(weight)


def stylegan2(demodulate=True):
    def reference(state, x, condition, layer):
        styles = condition @ state["proj.weight"].T + state["proj.bias"]
        rows = [
            convolve(layer, row, styled(layer, style, demodulate))
            for row, style in zip(x, styles, strict=True)
        ]
        y = torch.stack(rows)
        if layer.bias is None:
            return y
        linear = isinstance(layer, nn.Linear)
        return y + (layer.bias if linear else layer.bias.reshape(-1, *[1] * (y.ndim - 2)))

    return reference


def style_of_one(module, x, layer):
    """What the layer gives at a style of 1."""
    (style,) = module.generate(torch.zeros(len(x), 4))
    assert torch.equal(style.style, torch.ones(len(x), 6))
    return module.exit(x, layer(x), style, layer)


def stylegan2_cases():
    ranks = {1: ((5,), (1,), (4,)), 2: MAPS, 3: ((2, 3, 4),)}
    one = {"label": "stylegan2"}
    yield ModulatorCase(
        "stylegan2", WIDE, stylegan2(), sublayer=LINEAR, neutral=style_of_one, **one
    )
    for label, positions, layer in (
        ("stylegan2-conv1d", ranks[1], partial(nn.Conv1d, 6, 8, 3, padding=1, bias=False)),
        ("stylegan2-conv2d-groups", ranks[2], partial(nn.Conv2d, 6, 8, 3, 2, 1, groups=2)),
        ("stylegan2-conv_transpose1d", ranks[1], partial(nn.ConvTranspose1d, 6, 8, 3)),
        (
            "stylegan2-conv_transpose3d-groups",
            ranks[3],
            partial(nn.ConvTranspose3d, 6, 8, 2, 2, groups=2, bias=False),
        ),
    ):
        yield ModulatorCase(
            "stylegan2",
            FIRST,
            stylegan2(),
            positions=positions,
            sublayer=layer,
            neutral=style_of_one,
            label=label,
        )
    yield ModulatorCase(
        "stylegan2(demodulate=False)",
        SQUARE,
        stylegan2(demodulate=False),
        positions=ranks[2],
        sublayer=partial(nn.Conv2d, 6, 6, 3, padding=1),
        neutral=lambda module, x, layer: layer(x),
    )


def update_of_one(state, c, rank, features):
    """(A, B) that the hypernetwork has for one sample."""
    if "hidden.0.weight" in state:
        c = F.silu(c @ state["hidden.0.weight"].T + state["hidden.0.bias"])
    factors = c @ state["proj.weight"].T + state["proj.bias"]
    down, up = factors[: rank * features], factors[rank * features :]
    return down.reshape(rank, features), up.reshape(rank, -1).T


def hypernetwork(site, rank, scale):
    def reference(state, x, condition, layer):
        rows = []
        for row, c in zip(x, condition, strict=True):
            down, up = update_of_one(state, c, rank, site.features)
            row = row.movedim(0, -1) if site.channel_dim == 1 else row
            change = row @ (scale * up @ down).T
            rows.append(change.movedim(-1, 0) if site.channel_dim == 1 else change)
        return layer(x) + torch.stack(rows)

    return reference


def conditional_low_rank(site, scale):
    def reference(state, x, condition, layer):
        dim = site.channel_dim
        c = condition.movedim(dim, -1) if condition.ndim > 2 else condition
        weights = c @ state["proj.weight"].T + state["proj.bias"]
        weights = weights.reshape(len(x), *[1] * (x.ndim - weights.ndim), *weights.shape[1:])
        h = weights * (x.movedim(dim, -1) @ state["down.weight"].T)
        return layer(x) + scale * (h @ state["up.weight"].T).movedim(-1, dim)

    return reference


def low_rank_cases():
    pointwise = partial(nn.Conv2d, 6, 6, 1)
    for site, positions, layer in (
        (WIDE, ModulatorCase.positions, LINEAR),
        (SQUARE, MAPS, pointwise),
    ):
        yield ModulatorCase(
            "conditional_low_rank(rank=3, alpha=6.0)",
            site,
            conditional_low_rank(site, 2.0),
            positions=positions,
            sublayer=layer,
        )
        yield ModulatorCase(
            "hypernetwork(rank=3, alpha=6.0, hidden=[5])",
            site,
            hypernetwork(site, 3, 2.0),
            positions=positions,
            sublayer=layer,
        )


def conditional_conv(site, spatial_dims):
    """Each expert's convolution for itself, then the mixture of what they give."""
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial_dims]

    def reference(state, x, condition):
        shares = 1 / (1 + (-condition @ state["proj.weight"].T - state["proj.bias"]).exp())
        first = x.movedim(site.channel_dim, 1)
        given = torch.stack([conv(first, kernel, padding="same") for kernel in state["weight"]], 1)
        shares = shares.reshape(*shares.shape, *[1] * (first.ndim - 1))
        return (shares * given).sum(1).movedim(1, site.channel_dim)

    return reference


def conditional_conv_cases():
    square = Site(6, 4, name="blocks.0.mlp")
    for site, spec, sides, positions in (
        (SQUARE, "conditional_conv(experts=3)", 2, MAPS),
        (square, "conditional_conv(experts=2, kernel=5, spatial_dims=1)", 1, ((5,), (1,), (4,))),
        (SQUARE, "conditional_conv(kernel=1, spatial_dims=3)", 3, ((2, 3, 2),)),
    ):
        yield ModulatorCase(spec, site, conditional_conv(site, sides), positions=positions)


CASES = [*stylegan2_cases(), *low_rank_cases(), *conditional_conv_cases()]
