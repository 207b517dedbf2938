"""The sequences of ops that a CPU is given: as exact as the formula, and no heavier.

Every pass runs with thresholds of 0, so that small features take the ways of large ones.
"""

from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from condmod import ShapeError
from condmod.functional import (
    Indexed,
    add_shift,
    eager,
    featurewise_affine,
    featurewise_scale,
    gated_residual,
    normalisation,
    norms,
)

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
KINDS = ("none", "layer", "rms", "group", "instance")
LEAVES = ("global", "aligned", "rows")
SHAPES = ((3, 5, 8), (1, 7, 8), (2, 3, 4, 8))


@pytest.fixture(autouse=True)
def as_if_large(monkeypatch):
    for name in ("SMALL", "LARGE", "SAMPLE"):
        monkeypatch.setattr(eager, name, 0)
    monkeypatch.setattr(norms, "SMALL", 0)


def drawn(shape, leaf, dim, dtype, seed=0):
    """Features, and twice a leaf as tensors that want gradients, with what makes a leaf of one."""
    torch.manual_seed(seed)
    batch, *positions, width = shape
    x = torch.randn(shape).movedim(-1, dim).contiguous().to(dtype).requires_grad_()
    size = {"global": (), "aligned": positions, "rows": (3,)}[leaf]
    tables = [torch.randn(batch, *size, width).to(dtype).requires_grad_() for _ in range(2)]
    index = torch.randint(3, (batch, *positions))
    return (
        x,
        tables,
        (lambda value: Indexed(value, index)) if leaf == "rows" else lambda value: value,
    )


def spelt(x, value, leaf, dim):
    """A leaf as it broadcasts against the features."""
    made = leaf(value)
    if isinstance(made, Indexed):
        value = torch.stack([rows[at] for rows, at in zip(made.rows, made.index, strict=True)])
    if value.ndim == 2:
        value = value.reshape(len(value), *[1] * (x.ndim - 2), -1)
    return value.movedim(-1, dim)


def normed(x, kind, dim, norm):
    """The norm, position by position or group by group, from its formula."""
    if kind == "none":
        return x
    if kind in {"layer", "rms"}:
        h = x - x.mean(dim, keepdim=True) if kind == "layer" else x
        h = h / (h.square().mean(dim, keepdim=True) + 1e-3).sqrt()
    else:
        flat = x.movedim(dim, 1).flatten(2).unflatten(1, (norm.groups, -1)).flatten(2)
        h = flat - flat.mean(-1, keepdim=True)
        h = h / (h.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        h = h.view(x.movedim(dim, 1).shape).movedim(1, dim)
    vector = [1] * x.ndim
    vector[dim] = -1
    if norm.weight is not None:
        h = h * norm.weight.double().view(vector)
    return h if norm.bias is None else h + norm.bias.double().view(vector)


def norm_of(kind, width, dim, affine):
    if kind == "none":
        return None
    norm = normalisation(kind, width, dim, eps=1e-3, groups=2, affine=affine)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


CASES = [
    (shape, kind, leaf, dim, affine)
    for shape, kind, leaf, dim in product(SHAPES, KINDS, LEAVES, (-1, 1))
    for affine in (
        ("none", "both") if kind in {"layer", "group"} and len(shape) == 3 else ("none",)
    )
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "kind", "leaf", "dim", "affine"), CASES)
def test_values_and_gradients_are_those_of_the_formula(shape, kind, leaf, dim, affine, dtype):
    x, (scale, shift), made = drawn(shape, leaf, dim, dtype)
    norm = norm_of(kind, shape[-1], dim, affine)
    weights = [] if norm is None else list(norm.parameters())
    passes = {
        "affine": lambda s, t: featurewise_affine(x, (made(s), made(t)), dim, norm=norm),
        "scale": lambda s, t: featurewise_scale(x, made(s), dim, form="raw", norm=norm),
        "shift": lambda s, t: add_shift(x, made(t), dim, norm=norm),
        "residual": lambda s, t: featurewise_affine(
            x, (made(s), made(t)), dim, form="raw", residual=True, norm=norm
        ),
    }
    wide = [value.detach().double().requires_grad_() for value in (x, scale, shift)]
    h = normed(wide[0], kind, dim, norm)
    s, t = (spelt(x, value, made, dim) for value in wide[1:])
    wanted = {
        "affine": (1 + s) * h + t,
        "scale": s * h,
        "shift": h + t,
        "residual": wide[0] * 0 + (s + 1) * h + t,
    }
    for name, run in passes.items():
        y = run(scale, shift)
        with torch.no_grad():
            plain = run(scale, shift)
        seed = torch.randn_like(y)
        got = torch.autograd.grad(y, [x, scale, shift, *weights], seed, allow_unused=True)
        want = torch.autograd.grad(
            wanted[name], [*wide, *weights], seed.double(), allow_unused=True, retain_graph=True
        )
        assert y.dtype == x.dtype
        assert y.is_contiguous()
        assert plain.is_contiguous()
        for one, other in zip((y, plain, *got), (wanted[name], wanted[name], *want), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                far = (one.double() - other.double()).norm() / other.double().norm().clamp_min(1)
                assert far < TOLERANCE[dtype], (name, far)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "leaf", "dim"), [*product(SHAPES, LEAVES, (-1, 1))])
def test_a_gate_is_that_of_the_formula(shape, leaf, dim, dtype):
    x, (gate, _), made = drawn(shape, leaf, dim, dtype)
    y = torch.randn_like(x).requires_grad_()
    wide = [value.detach().double().requires_grad_() for value in (x, y, gate)]
    joined = wide[0] + spelt(x, wide[2], made, dim) * wide[1]
    got = gated_residual(x, y, made(gate), dim)
    with torch.no_grad():
        plain = gated_residual(x, y, made(gate), dim)
    seed = torch.randn_like(x)
    grads = torch.autograd.grad(got, (x, y, gate), seed)
    wanted = torch.autograd.grad(joined, wide, seed.double())
    for one, other in zip((got, plain, *grads), (joined, joined, *wanted), strict=True):
        assert (one.double() - other).norm() / other.norm() < TOLERANCE[dtype]


WAYS = [
    ("none", "global", 1, torch.float32, True, "_by_channels"),
    ("none", "global", 1, torch.bfloat16, False, "_by_channels"),
    ("none", "global", -1, torch.bfloat16, True, "_by_rows"),
    ("layer", "global", -1, torch.float32, True, "_by_samples"),
    ("layer", "global", -1, torch.float16, False, "_by_samples"),
    ("group", "global", 1, torch.float32, True, "_by_groups"),
    ("instance", "global", 1, torch.float32, False, "_by_groups"),
    ("layer", "aligned", -1, torch.float32, True, None),
    ("rms", "global", -1, torch.float32, True, None),
    ("none", "global", -1, torch.float32, True, None),
]


@pytest.mark.parametrize(("kind", "leaf", "dim", "dtype", "training", "way"), WAYS)
def test_each_case_takes_its_way(monkeypatch, kind, leaf, dim, dtype, training, way):
    x, (scale, shift), made = drawn((3, 5, 8), leaf, dim, dtype)
    taken = []
    for name in ("_by_channels", "_by_rows", "_by_samples", "_by_groups"):
        inner = getattr(eager, name)

        def spy(*given, inner=inner, name=name):
            taken.append(name)
            return inner(*given)

        monkeypatch.setattr(eager, name, spy)
    with torch.set_grad_enabled(training):
        featurewise_affine(x, (made(scale), made(shift)), dim, norm=norm_of(kind, 8, dim, "none"))
    assert taken == ([way] if way else [])


SAVED = [
    ("none", "global", 1, 0),
    ("none", "global", -1, 0),
    ("layer", "global", -1, 0),
    ("group", "global", 1, 0),
    ("instance", "global", 1, 0),
    ("none", "aligned", -1, 1),  # 1 + scale
    ("layer", "aligned", -1, 2),  # and norm(x)
]


@pytest.mark.parametrize(("kind", "leaf", "dim", "count"), SAVED)
def test_what_is_kept_for_the_backward_is_counted(kind, leaf, dim, count):
    x, (scale, shift), made = drawn((3, 50, 8), leaf, dim, torch.float32)
    norm = norm_of(kind, 8, dim, "none")

    def run():
        return featurewise_affine(x, (made(scale), made(shift)), dim, norm=norm)

    assert kept(run, (x, scale, shift)) == count


@pytest.mark.parametrize("leaf", ["global", "aligned"])
def test_a_gate_keeps_its_branch_alone(leaf):
    x, (gate, _), made = drawn((3, 50, 8), leaf, -1, torch.float32)
    y = torch.randn_like(x).requires_grad_()
    branch = y * 1
    assert kept(lambda: gated_residual(x, branch, made(gate)), (x, y, gate)) == 1


def kept(run, inputs):
    """How many tensors as large as the features are kept that are not inputs."""
    found = {}

    def pack(value):
        storage = value.untyped_storage()
        if value.numel() and storage.nbytes() >= inputs[0].nbytes:
            found[storage.data_ptr()] = value
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        y = run()
    own = {value.untyped_storage().data_ptr() for value in inputs}
    assert y.requires_grad
    return len(found.keys() - own)


@pytest.mark.parametrize(("kind", "leaf", "dim"), [*product(KINDS, LEAVES, (-1, 1))])
def test_nothing_that_was_given_is_written_to(kind, leaf, dim):
    x, (scale, shift), made = drawn((3, 5, 8), leaf, dim, torch.float32)
    before = [value.clone() for value in (x, scale, shift)]
    with torch.no_grad():
        for form in ("raw", "one_plus"):
            norm = norm_of(kind, 8, dim, "none")
            featurewise_affine(x, (made(scale), made(shift)), dim, form=form, norm=norm)
            gated_residual(x, x, made(scale), dim)
        featurewise_affine(x, (made(scale), made(shift)), dim, norm=lambda h: h)
    assert all(map(torch.equal, before, (x, scale, shift)))


@torch.no_grad()
def test_who_listens_to_a_norm_still_hears_it_and_may_keep_what_it_gave():
    norm, heard = norm_of("layer", 8, -1, "none"), []
    norm.register_forward_hook(lambda module, given, out: heard.append(out))
    x, pair, _ = drawn((1, 5, 8), "global", -1, torch.float32)
    featurewise_affine(x, tuple(pair), norm=norm)
    (kept,) = heard
    torch.testing.assert_close(kept, norm.forward(x))


@pytest.mark.parametrize(("kind", "leaf", "dim", "dtype", "training", "way"), WAYS)
def test_features_that_need_no_gradient_leave_their_modulation_its_own(
    kind, leaf, dim, dtype, training, way
):
    x, pair, made = drawn((3, 5, 8), leaf, dim, dtype)
    norm = norm_of(kind, 8, dim, "none")
    want = torch.autograd.grad(run_with(x, pair, made, dim, norm), pair)
    got = torch.autograd.grad(run_with(x.detach(), pair, made, dim, norm), pair)
    torch.testing.assert_close(got, want)


def run_with(x, pair, made, dim, norm):
    return featurewise_affine(x, tuple(map(made, pair)), dim, norm=norm).float().square().sum()


@pytest.mark.parametrize(("kind", "leaf", "dim", "dtype", "training", "way"), WAYS)
def test_autocast_changes_nothing(kind, leaf, dim, dtype, training, way):
    x, pair, made = drawn((3, 5, 8), leaf, dim, dtype)
    norm = norm_of(kind, 8, dim, "none")
    with torch.set_grad_enabled(training):
        want = featurewise_affine(x, tuple(map(made, pair)), dim, norm=norm)
        with torch.autocast("cpu", torch.bfloat16):
            got = featurewise_affine(x, tuple(map(made, pair)), dim, norm=norm)
    assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("kind", "dim"), [("none", 1), ("layer", -1), ("group", 1)])
def test_transforms_of_torch_go_through(kind, dim):
    x, (scale, shift), _ = drawn((3, 5, 8), "global", dim, torch.float64)
    norm = norm_of(kind, 8, dim, "both")

    def run(x, scale, shift):
        return featurewise_affine(x, (scale, shift), dim, norm=norm)

    assert torch.autograd.gradgradcheck(run, (x, scale, shift))
    inputs = [value.detach() for value in (x, scale, shift)]
    value, slope = torch.func.jvp(run, tuple(inputs), tuple(map(torch.ones_like, inputs)))
    torch.testing.assert_close(value, run(*inputs))
    step = 1e-6
    moved = run(*(value + step for value in inputs)) - run(*(value - step for value in inputs))
    torch.testing.assert_close(slope, moved / (2 * step), rtol=1e-5, atol=1e-6)
    doubled = [torch.stack([value, value + 1]) for value in inputs]
    each = torch.stack([run(*(value[i] for value in doubled)) for i in range(2)])
    torch.testing.assert_close(torch.vmap(run)(*doubled), each)


@pytest.mark.parametrize("kind", KINDS)
def test_features_in_another_layout_and_empty_ones_go_through(kind):
    norm = norm_of(kind, 8, 1, "none")
    pair = torch.randn(2, 8), torch.randn(2, 8)
    x = torch.randn(2, 8, 4, 6)
    want = featurewise_affine(x, pair, 1, norm=norm)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(featurewise_affine(last, pair, 1, norm=norm), want)
    strided = torch.randn(2, 8, 4, 12)[..., ::2]
    torch.testing.assert_close(
        featurewise_affine(strided, pair, 1, norm=norm),
        featurewise_affine(strided.contiguous(), pair, 1, norm=norm),
    )
    if kind in {"none", "layer", "rms"}:
        empty = featurewise_affine(x[:0], (pair[0][:0], pair[1][:0]), 1, norm=norm)
        assert empty.shape == (0, 8, 4, 6)


@pytest.mark.parametrize(("kind", "dim", "what"), [("layer", -1, 6), ("group", 1, 6)])
def test_other_channels_than_the_norms_are_refused_with_the_place(kind, dim, what):
    x, norm = torch.zeros(2, what, what), norm_of(kind, 8, dim, "none")
    with pytest.raises(ShapeError) as caught:
        featurewise_affine(
            x, (torch.zeros(2, 8),) * 2, dim, norm=norm, where=lambda: "adaln at 'a'"
        )
    assert str(caught.value) == (
        f"the norm is over 8 channels at dim {dim}; got (2, 6, 6) in adaln at 'a'"
    )


SUMS = [("layer", "global", -1), ("layer", "rows", -1), ("none", "rows", -1), ("none", "global", 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "leaf", "dim"), [*SUMS, ("group", "global", 1)])
def test_sums_over_many_positions_lose_nothing_in_half_precision(kind, leaf, dim, dtype):
    x, pair, made = drawn((2, 4096, 8), leaf, dim, dtype)
    norm = norm_of(kind, 8, dim, "none" if leaf == "rows" else "both")
    y = featurewise_affine(x, tuple(map(made, pair)), dim, norm=norm)
    weights = [] if norm is None else list(norm.parameters())
    got = torch.autograd.grad(y, [pair[1], *weights], torch.ones_like(y))
    if leaf == "global":
        torch.testing.assert_close(got[0].float(), torch.full((2, 8), 4096.0))
    else:
        assert (got[0].float().sum(1) - 4096).abs().max() < 32
    if weights:
        factor = 1 + pair[0].detach().float()
        torch.testing.assert_close(got[2].float(), 4096 * factor.sum(0), rtol=1e-2, atol=1.0)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_torch_does_not_matter(default):
    halves, *_ = drawn((3, 5, 8), "global", -1, torch.bfloat16)
    x, pair, _ = drawn((3, 5, 8), "global", -1, torch.float32)
    low = tuple(value.bfloat16() for value in pair)
    norm = normalisation("layer", 8)

    def run():
        with torch.no_grad():
            yield featurewise_affine(x, tuple(pair), norm=norm)
            yield featurewise_affine(halves, low)
            yield norm(x)

    want = list(run())
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = list(run())
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, got, want))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("kind", "dim"), [("group", 1), ("layer", -1), ("none", 1)])
def test_a_traced_pass_serves_another_batch(kind, dim):
    norm = norm_of(kind, 8, dim, "none")

    def run(x, scale, shift):
        return featurewise_affine(x, (scale, shift), dim, norm=norm)

    def inputs(batch):
        x, pair, _ = drawn((batch, 5, 8), "global", dim, torch.float32)
        return x, *pair

    traced = torch.jit.trace(run, inputs(1))
    torch.testing.assert_close(traced(*inputs(5)), run(*inputs(5)))


@torch.no_grad()
def test_who_listens_to_every_module_hears_a_norm():
    norm, heard = norm_of("layer", 8, -1, "none"), []
    x, pair, _ = drawn((1, 5, 8), "global", -1, torch.float32)
    handle = nn.modules.module.register_module_forward_hook(lambda *call: heard.append(call[0]))
    try:
        featurewise_affine(x, tuple(pair), norm=norm)
    finally:
        handle.remove()
    assert heard == [norm]
    norm.forward = lambda h: h * 0 + 3
    shift = pair[1][:, None].expand(1, 5, 8)
    got = featurewise_affine(x, (torch.zeros_like(pair[0]), pair[1]), norm=norm)
    torch.testing.assert_close(got, 3 + shift)


def test_many_small_samples_are_not_taken_one_by_one(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(eager, "_stacked", None)
    x, pair, _ = drawn((512, 16, 64), "global", -1, torch.bfloat16)
    featurewise_affine(x, tuple(pair), norm=norm_of("layer", 64, -1, "none"))
    featurewise_affine(x, tuple(pair))
