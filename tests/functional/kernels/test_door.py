"""The door of the passes with the backend triton: what kernels serve, and what goes by torch."""

from itertools import product

import pytest
import torch
from torch import nn

import condmod
from condmod import ConditionError, ShapeError
from condmod.functional import (
    Indexed,
    add_shift,
    featurewise_affine,
    featurewise_scale,
    gated_residual,
    gated_residual_affine,
    kernels,
    normalisation,
    use_backend,
)

LEAVES = ("global", "aligned", "rows")
KINDS = ("none", "layer", "rms", "group", "instance")


@pytest.fixture
def served(monkeypatch):
    """The names of the kernels that were called."""
    called = []
    for name in ("norm_affine", "gate_residual", "gate_residual_norm_affine"):
        inner = getattr(kernels, name)

        def spy(*given, inner=inner, name=name, **options):
            called.append(name)
            return inner(*given, **options)

        monkeypatch.setattr(kernels, name, spy)
    return called


def drawn(leaf, dim, device):
    torch.manual_seed(0)
    size = {"global": (), "aligned": (3,), "rows": (4,)}[leaf]
    index = torch.randint(4, (2, 3))
    x, y = (torch.randn(2, 3, 8).movedim(-1, dim).contiguous() for _ in range(2))
    values = [x, y, *(torch.randn(2, *size, 8) for _ in range(3))]
    values = [value.to(device).requires_grad_() for value in values]

    def made(value):
        return Indexed(value, index.to(device)) if leaf == "rows" else value

    return values, made


def norm_of(kind, dim, device, affine="none"):
    if kind == "none":
        return None
    norm = normalisation(kind, 8, dim, groups=2, affine=affine).to(device)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def all_passes(values, made, dim, norm, form="one_plus"):
    x, y, gate, scale, shift = values
    gate, scale, shift = map(made, (gate, scale, shift))
    found = (
        featurewise_affine(x, (scale, shift), dim, form=form, residual=True, norm=norm),
        featurewise_scale(x, scale, dim, form=form, norm=norm),
        add_shift(x, shift, dim, norm=norm),
        gated_residual(x, y, gate, dim, form="tanh"),
        *gated_residual_affine(x, y, gate, (scale, shift), dim, norm=norm),
    )
    total = sum(value.square().sum() for value in found)
    return *found, *torch.autograd.grad(total, values)


@pytest.mark.parametrize(("kind", "leaf", "dim"), [*product(KINDS, LEAVES, (-1, 1))])
def test_it_gives_what_the_eager_ops_give(served, device, kind, leaf, dim):
    values, made = drawn(leaf, dim, device)
    norm = norm_of(kind, dim, device)
    want = all_passes(values, made, dim, norm)
    assert not served
    with use_backend("triton"):
        got = all_passes(values, made, dim, norm)
    between = ["gate_residual_norm_affine"]
    if kind in {"group", "instance"}:
        between = ["gate_residual", "norm_affine"]
    assert served == ["norm_affine"] * 3 + ["gate_residual", *between]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["raw", "one_plus", "sigmoid", "exp", "one_plus_tanh"])
def test_every_form_of_a_scale_is_served(served, device, form):
    values, made = drawn("aligned", -1, device)
    norm = norm_of("layer", -1, device)
    want = all_passes(values, made, -1, norm, form)
    with use_backend("triton"):
        got = all_passes(values, made, -1, norm, form)
    assert len(served) == 5
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("leaf", "count"), [("global", 3), ("rows", 3), ("aligned", 0)])
def test_a_norm_with_its_own_affine_is_served_where_its_vectors_are_small(
    served, device, leaf, count
):
    values, made = drawn(leaf, -1, device)
    norm = norm_of("layer", -1, device, affine="both")
    x, _, _, scale, shift = values
    pair = made(scale), made(shift)
    want = featurewise_affine(x, pair, norm=norm)
    slopes = torch.autograd.grad(want.square().sum(), [*values[:1], *norm.parameters()])
    with use_backend("triton"):
        got = featurewise_affine(x, pair, norm=norm)
        for _ in range(2):
            featurewise_affine(x, pair, norm=norm)
    assert served == ["norm_affine"] * count
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(got.square().sum(), [*values[:1], *norm.parameters()])
    torch.testing.assert_close(found, slopes, rtol=1e-4, atol=1e-4)


def test_what_no_kernel_serves_goes_by_torch(served, device):
    values, _ = drawn("global", -1, device)
    x, y, gate, scale, shift = values
    batch = normalisation("batch", 8).to(device)
    with use_backend("triton"):
        own = featurewise_affine(x, (scale, shift), norm=lambda h: 2 * h)
        gated_residual(x, y, gate, norm=norm_of("rms", -1, device))
        featurewise_affine(x, (scale, shift), norm=batch)
    assert not served
    torch.testing.assert_close(own, featurewise_affine(2 * x, (scale, shift)))


def test_errors_are_those_of_every_backend(device):
    values, _ = drawn("global", -1, device)
    x = values[0]
    with use_backend("triton"):
        with pytest.raises(ShapeError, match=r"^modulation \(1, 8\) does not fit features"):
            add_shift(x, torch.zeros(1, 8, device=device))
        with pytest.raises(ShapeError, match=r"^the norm is over 8 channels .* in adaln$"):
            add_shift(
                x[..., :4],
                torch.zeros(2, 4, device=device),
                norm=norm_of("layer", -1, device),
                where=lambda: "adaln",
            )
        floating = Indexed(torch.zeros(2, 4, 8, device=device), torch.zeros(2, 3, device=device))
        with pytest.raises(ConditionError, match=r"^the index of rows is integer"):
            add_shift(x, floating)


@pytest.mark.parametrize("spec", ["film", "dense_film(residual=True)", "adaln", "ada_group_norm"])
def test_modulators_go_through_the_door(served, device, spec):
    torch.manual_seed(0)
    modulator = condmod.create(spec, features=32, condition_dim=4).to(device)
    x, c = torch.randn(2, 3, 32, device=device), torch.randn(2, 4, device=device)
    want = modulator(x, c)
    with use_backend("triton"):
        got = modulator(x, c)
    assert served == ["norm_affine"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", ["adaln_zero", "adaln_single", "mmdit"])
def test_a_block_goes_from_one_sublayer_to_the_next_in_one_pass(served, device, spec):
    torch.manual_seed(0)
    bank = condmod.create_bank(spec, {"block": condmod.Site(8, 4)}).to(device)
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    x, c = torch.randn(2, 3, 8, device=device), torch.randn(2, 4, device=device)
    made = bank(c)["block"]
    sublayers = (torch.tanh, torch.sin)
    want = bank["block"].around(x, made, *sublayers)
    with use_backend("triton"):
        got = bank["block"].around(x, made, *sublayers)
    assert served == ["norm_affine", "gate_residual_norm_affine", "gate_residual"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_takes_the_kernels_in_one_graph(served, device, fresh_graphs):
    modulator = condmod.create("adaln", features=8, condition_dim=4).to(device)
    x, c = torch.randn(2, 3, 8, device=device), torch.randn(2, 4, device=device)
    want = modulator(x, c)
    with use_backend("triton"):
        got = torch.compile(modulator, backend="aot_eager", fullgraph=True)(x, c)
    assert served == ["norm_affine"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
