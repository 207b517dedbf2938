"""The kernels are operators of torch: compile, export, autocast and fake tensors know them."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from condmod.functional import kernels
from condmod.functional.kernels import ops

CASES = {
    "both": {"op": "both", "shape": (2, 3, 5), "norm": "layer"},
    "rows": {"op": "both", "shape": (2, 5, 3), "norm": "rms", "leaf": "rows", "channel_dim": 1},
    "group": {"op": "affine", "shape": (2, 6, 3), "norm": "group", "groups": 3, "channel_dim": 1},
    "chunk": {"op": "affine", "shape": (2, 3, 5), "leaf": "chunk"},
    "gate": {"op": "gate", "shape": (2, 3, 5)},
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def problem(request, case, make):
    return make(case(**request.param), torch.float32)


def operator_call(problem):
    """The operator behind a case, and what it is called with."""
    case, index = problem.case, problem.index
    x, y, gate, scale, shift = problem.tensors.values()
    if case.op == "gate":
        return ops.gate_residual, (x, y, gate, index, case.channel_dim, 0.5)
    if case.op == "both":
        reading = (case.channel_dim, 0.5, 1.0, case.norm, 1e-5)
        return ops.gate_residual_norm_affine, (x, y, gate, scale, shift, index, *reading)
    reading = (case.channel_dim, 1.0, case.norm or "none", case.groups, 1e-5)
    return ops.norm_affine, (x, scale, shift, index, *reading)


def test_operators_keep_the_rules_of_torch(problem, fresh_graphs):
    operator, arguments = operator_call(problem)
    torch.library.opcheck(operator, arguments, atol=1e-4, rtol=1e-4)


def test_the_operator_of_gradients_keeps_the_rules_of_torch(case, make, fresh_graphs):
    problem = make(case("both", (2, 3, 5), "global", "layer"), torch.float32)
    parts = [part.detach() for part in problem.tensors.values()]
    upstream = [torch.ones_like(parts[0]), torch.ones_like(parts[0])]
    stats = torch.ones(2, 2, 3, device=parts[0].device)
    constants = (-1, 0.5, 1.0, "layer", 1, torch.bfloat16, [True] * 5)
    arguments = (*upstream, *parts, None, stats, *constants)
    torch.library.opcheck(ops.modulation_backward, arguments)
    made = ops.modulation_backward(*arguments)
    assert [part.dtype == torch.bfloat16 for part in made] == [False, True, False, False, False]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_is_the_eager_one(dynamic, problem, fresh_graphs):
    def call(*inputs: Tensor) -> list[Tensor]:
        outputs = problem.run(*inputs)
        return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), inputs)]

    def outputs_of(*inputs: Tensor) -> tuple[Tensor, ...]:
        return problem.run(*inputs)

    compiled = torch.compile(outputs_of, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager = call(*problem.inputs)
    outputs = compiled(*problem.inputs)
    gradients = torch.autograd.grad(sum(out.square().sum() for out in outputs), problem.inputs)
    for found, wanted in zip([*outputs, *gradients], eager, strict=True):
        assert torch.equal(found, wanted)
        assert found.stride() == wanted.stride()


class Site(nn.Module):
    def __init__(self, problem) -> None:
        super().__init__()
        self.problem = problem

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.problem.run(*inputs)


def test_an_exported_call_is_the_eager_one(problem, fresh_graphs):
    program = torch.export.export(Site(problem), tuple(problem.inputs), strict=True)
    operator, _ = operator_call(problem)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(operator._opoverload) == 1
    for found, wanted in zip(program.module()(*problem.inputs), problem.run(), strict=True):
        assert torch.equal(found, wanted)


def test_autocast_changes_nothing(problem, device):
    wanted = problem.run()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = problem.run()
    for part, right in zip(found, wanted, strict=True):
        assert part.dtype == right.dtype
        assert torch.equal(part, right)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, -1).contiguous().transpose(1, -1)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


LAYOUTS = {
    "contiguous": ((2, 3, 5), -1, Tensor.contiguous, True),
    "transposed": ((2, 3, 5), -1, transposed, True),
    "first": ((2, 3, 4, 5), 1, Tensor.contiguous, True),
    "channels-last": ((2, 3, 4, 5), 1, channels_last, False),
}


@pytest.mark.parametrize(
    ("shape", "channel_dim", "memory", "contiguous"), LAYOUTS.values(), ids=list(LAYOUTS)
)
def test_outputs_and_gradients_have_the_layout_that_fakes_tell(
    shape, channel_dim, memory, contiguous, device
):
    def strides(device: torch.device) -> list[tuple[int, ...]]:
        x, y = (
            memory(torch.ones(shape, device=device)).detach().requires_grad_() for _ in range(2)
        )
        leaves = [
            torch.ones(shape[0], shape[channel_dim], device=device, requires_grad=True)
            for _ in range(3)
        ]
        outputs = kernels.gate_residual_norm_affine(
            x, y, *leaves, channel_dim=channel_dim, norm="layer"
        )
        upstream = [memory(torch.ones(shape, device=device)) for _ in outputs]
        gradients = torch.autograd.grad(outputs, (x, y, *leaves), upstream)
        assert outputs[0].is_contiguous() is contiguous
        if channel_dim == 1 and not contiguous:
            assert outputs[0].is_contiguous(memory_format=torch.channels_last)
            assert gradients[0].is_contiguous(memory_format=torch.channels_last)
        return [part.stride() for part in (*outputs, *gradients)]

    real = strides(device)
    assert strides(torch.device("meta")) == real
    with FakeTensorMode():
        assert strides(device) == real
