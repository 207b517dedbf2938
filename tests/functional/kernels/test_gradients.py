"""Which gradients are made, of what, and what is kept until then."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from condmod.functional import kernels
from condmod.functional.kernels import layout

VARIETY = {
    "global": {"op": "both", "shape": (2, 3, 5), "norm": "layer"},
    "chunk": {"op": "both", "shape": (2, 3, 5), "norm": "rms", "leaf": "chunk"},
    "rows": {"op": "both", "shape": (2, 5, 3), "norm": "layer", "leaf": "rows", "channel_dim": 1},
    "group": {"op": "affine", "shape": (2, 3, 6), "norm": "group", "groups": 2},
    "rows-group": {
        "op": "affine", "shape": (2, 3, 6), "norm": "group", "groups": 2, "leaf": "rows",
    },
    "no-norm": {"op": "affine", "shape": (2, 3, 5)},
    "gate": {"op": "gate", "shape": (2, 3, 5), "leaf": "rows"},
}  # fmt: skip


@pytest.fixture(params=VARIETY.values(), ids=list(VARIETY))
def problem(request, case, make):
    return make(case(**request.param), torch.float64)


def gradients(outputs, inputs):
    return torch.autograd.grad(
        outputs, inputs, [torch.full_like(out, 0.5) + out for out in outputs]
    )


def test_gradients_are_the_limits_of_differences(problem):
    assert torch.autograd.gradcheck(problem.run, problem.inputs, fast_mode=True)


def test_a_gradient_is_the_same_whatever_else_is_wanted(problem):
    together = gradients(problem.run(), problem.inputs)
    for place, gradient in enumerate(together):
        alone = [tensor.detach() for tensor in problem.inputs]
        alone[place].requires_grad_()
        (found,) = gradients(problem.run(*alone), [alone[place]])
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("leaf", ["global", "rows"])
def test_one_of_two_outputs_may_go_unused(used, leaf, case, make):
    problem = make(case("both", (2, 3, 5), leaf, "layer"), torch.float64)
    upstream = torch.arange(30.0, device=problem.inputs[0].device).view(2, 3, 5).double()
    found = torch.autograd.grad(
        problem.run()[used], problem.inputs, upstream, allow_unused=True, materialize_grads=True
    )
    wanted = torch.autograd.grad(
        problem.reference()[used],
        problem.inputs,
        upstream,
        allow_unused=True,
        materialize_grads=True,
    )
    for part, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(part, right, rtol=1e-10, atol=1e-10)


def test_upstream_gradients_may_be_expanded(problem):
    found, wanted = (
        torch.autograd.grad(sum(out.sum() for out in outputs), problem.inputs)
        for outputs in (problem.run(), problem.reference())
    )
    for part, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(part, right, rtol=1e-10, atol=1e-10)


def test_parts_keep_their_own_dtypes(device):
    x = torch.randn(2, 7, 5, device=device, requires_grad=True)
    y = torch.randn(2, 7, 5, device=device).bfloat16().requires_grad_()
    gate = torch.randn(2, 5, device=device).half().requires_grad_()
    scale = torch.randn(2, 7, 5, device=device).bfloat16().requires_grad_()
    outputs = kernels.gate_residual_norm_affine(x, y, gate, scale, None, norm="layer")
    assert [out.dtype for out in outputs] == [torch.float32] * 2
    parts = [x, y, gate, scale]
    found = torch.autograd.grad(sum(out.sum() for out in outputs), parts)
    assert [part.dtype for part in found] == [part.dtype for part in parts]


def kept(run, named: dict[str, Tensor]) -> dict[str, int]:
    """The elements that backward keeps, by whose memory they are; new memory is called new."""
    names = {part.untyped_storage().data_ptr(): name for name, part in named.items()}
    found: dict[str, int] = {}

    def pack(part: Tensor) -> Tensor:
        name = names.get(part.untyped_storage().data_ptr(), "new")
        found[name] = found.get(name, 0) + part.numel()
        return part

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
        run()
    return found


@pytest.mark.parametrize(
    ("op", "norm", "expected"),
    [
        ("affine", "layer", {"x": 3500, "scale": 10, "shift": 10, "new": 2 * 700}),
        ("affine", "group", {"x": 3500, "scale": 10, "shift": 10, "new": 2 * 10}),
        ("affine", None, {"x": 3500, "scale": 10, "shift": 10}),
        ("shift", None, {"shift": 10}),
        ("gate", None, {"y": 3500, "gate": 10}),
        (
            "both",
            "rms",
            {"x": 3500, "y": 3500, "gate": 10, "scale": 10, "shift": 10, "new": 2 * 700},
        ),
    ],
)
def test_backward_keeps_inputs_and_statistics_alone(op, norm, expected, case, make):
    problem = make(case(op, (2, 350, 5), norm=norm), torch.float32)
    named = {name: part for name, part in problem.tensors.items() if part is not None}
    assert kept(problem.run, named) == expected


def test_a_scale_that_nobody_trains_keeps_no_features(device):
    x = torch.randn(2, 350, 5, device=device, requires_grad=True)
    scale = torch.randn(2, 5, device=device)
    named = {"x": x, "scale": scale}
    assert kept(lambda: kernels.norm_affine(x, scale, None), named) == {"scale": 10}


@pytest.mark.parametrize("shape", [(1, 4096, 3072), (256, 256, 1152), (1, 37, 5), (1, 64, 3072)])
@pytest.mark.parametrize("rows", [1, 4])
def test_partial_sums_cover_all_positions_and_are_an_eighth_of_the_features_at_most(shape, rows):
    view = torch.empty(shape, device="meta")
    for tile in (layout.blocks(view, narrow=True), layout.line_blocks(view, narrow=True)):
        chunks, span = layout.spans(view, tile, rows)
        assert span % tile.p == 0
        assert (chunks - 1) * span < shape[1] <= chunks * span
        assert rows * (chunks - 1) * 8 < shape[1]


def test_second_derivatives_raise(problem):
    total = sum(out.square().sum() for out in problem.run())
    grown = torch.autograd.grad(total, problem.inputs[-1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grown[0].sum().backward()


@pytest.mark.filterwarnings(  # torch scripts its own formulas when the first tangent is made
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)
def test_forward_mode_derivatives_raise(problem):
    primals = tuple(part.detach() for part in problem.inputs)
    message = "triton kernels have no forward-mode derivatives; take the backend eager for them"
    with pytest.raises(NotImplementedError) as caught:
        torch.func.jvp(problem.run, primals, primals)
    assert str(caught.value) == message
    with forward_ad.dual_level(), pytest.raises(NotImplementedError) as caught:
        problem.run(*primals[:-1], forward_ad.make_dual(primals[-1], primals[-1]))
    assert str(caught.value) == message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_plus_scale_is_made_in_float32(dtype, device):
    x = torch.ones(1, 2, 3, dtype=dtype, device=device)
    scale = torch.full((1, 3), 2.0**-12, dtype=dtype, device=device)
    shift = -torch.ones(1, 3, dtype=dtype, device=device)
    out = kernels.norm_affine(x, scale, shift, plus=1.0)
    assert torch.equal(out, torch.full_like(x, 2.0**-12))
    aligned = kernels.norm_affine(x, scale.expand(1, 2, 3), shift.expand(1, 2, 3), plus=1.0)
    assert torch.equal(aligned, out)


def test_statistics_hold_far_from_zero(device):
    """As well as a mean in float32 can; a difference of squares would be off by dozens."""
    x = (torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0)) + 3e4).to(device)
    exact = torch.nn.functional.group_norm(x.double(), 2, eps=1e-6)
    found = kernels.norm_affine(x, None, None, channel_dim=1, norm="group", groups=2)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-2)
    exact = torch.nn.functional.layer_norm(x.double(), (9,), eps=1e-6)
    found = kernels.norm_affine(x, None, None, norm="layer")
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-2)


def test_a_row_that_is_not_there_gives_nan(device):
    x = torch.ones(1, 3, 2, device=device)
    rows = torch.ones(1, 4, 2, device=device)
    index = torch.tensor([[4, 0, -1]], device=device)
    out = kernels.norm_affine(x, rows, None, index=index)
    assert out.isnan().all(-1).tolist() == [[True, False, True]]


def test_far_offsets_are_wide(monkeypatch, problem):
    """What a tensor of 2**31 elements takes, without the memory."""
    near = [*problem.run(), *gradients(problem.run(), problem.inputs)]
    monkeypatch.setattr(layout, "is_far", lambda *parts: True)
    far = [*problem.run(), *gradients(problem.run(), problem.inputs)]
    assert all(torch.equal(one, other) for one, other in zip(near, far, strict=True))


def test_a_gradient_that_reaches_far_makes_offsets_wide(monkeypatch, device):
    asked = []
    x = torch.ones(2, 3, 5, device=device, requires_grad=True)
    upstream = torch.ones(2, 6, 5, device=device)[:, ::2]
    out = kernels.norm_affine(x, None, None, norm="rms")
    monkeypatch.setattr(layout, "is_far", lambda *parts: asked.extend(parts))
    out.backward(upstream)
    assert (30, 10, 1) in [part[1:] for part in asked if isinstance(part, tuple)]


def test_offsets_are_wide_where_some_tensor_reaches_far():
    small = torch.empty(2, 3, 5, device="meta")
    stretched = torch.empty_strided((2, 3, 5), (2**30, 5, 1), device="meta")
    assert not layout.is_far(small, layout.plain(small), None)
    assert layout.is_far(small, layout.plain(small), layout.plain(stretched))
    assert layout.is_far(torch.empty(1, device="meta").expand(2**10, 2**20, 1))


def test_chained_norms_with_chunks_of_one_parameter_have_their_gradients(device, fresh_graphs):
    """The case of pytorch/pytorch#193061, which torch 2.10 to 2.13 compile wrong on a GPU.

    The gradient of a table of which several norms read chunks, over more than 16384 positions.
    """
    on_gpu = device.type == "cuda"
    channels, positions = (1024, 32768) if on_gpu else (8, 64)
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(1, 4 * channels, generator=rng).to(device).requires_grad_()
    x = torch.randn(1, positions, channels, generator=rng).to(device).requires_grad_()
    upstream = torch.randn(1, positions, channels, generator=rng).to(device)

    def chained(x: Tensor, table: Tensor, block) -> Tensor:
        scale1, shift1, scale2, shift2 = table.chunk(4, -1)
        x = x + block(x, scale1, shift1)
        return x + block(x, scale2, shift2)

    def fused(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return kernels.norm_affine(x, scale, shift, plus=1.0, norm="layer")

    def formula(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normed = torch.nn.functional.layer_norm(x, (channels,), eps=1e-6)
        return normed * (1 + scale[:, None]) + shift[:, None]

    compiled = torch.compile(chained, fullgraph=True, backend="inductor" if on_gpu else "aot_eager")
    found = torch.autograd.grad(compiled(x, table, fused), (x, table), upstream)
    wide = [part.detach().double().requires_grad_() for part in (x, table)]
    wanted = torch.autograd.grad(chained(*wide, formula), wide, upstream.double())
    for part, right in zip(found, wanted, strict=True):
        assert (part.double() - right).abs().max() <= 1e-4 * right.abs().max()
