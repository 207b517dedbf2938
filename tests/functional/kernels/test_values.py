"""Outputs and gradients against the formula in float64, and the bits twice."""

import pytest
import torch
from torch import Tensor

# Bounds on the error by the largest value of the tensor. float64 and float32: what a sum of a few
# thousand terms may lose. Half precision is computed in float32 from inputs that are exact, and
# rounded: one unit, since Triton's interpreter cuts bfloat16 off where a GPU rounds it, and since
# the gradient of a gate's rows is summed from gradients that were rounded before.
BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, -1).contiguous().transpose(1, -1)


def swapped_positions(x: Tensor) -> Tensor:
    """Positions that no single stride goes through."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def every_second(x: Tensor) -> Tensor:
    return torch.stack((x, x), 1).flatten(0, 1)[::2]


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


ODD, MAP = (3, 7, 37), (2, 6, 5, 3)
CASES = {
    "affine": {"op": "affine", "shape": ODD},
    "affine-layer": {"op": "affine", "shape": ODD, "norm": "layer"},
    "affine-rms": {"op": "affine", "shape": ODD, "norm": "rms"},
    "affine-group": {"op": "affine", "shape": (2, 7, 36), "norm": "group", "groups": 3},
    "scale": {"op": "scale", "shape": ODD},
    "shift-layer": {"op": "shift", "shape": ODD, "norm": "layer"},
    "plain-rms": {"op": "plain", "shape": ODD, "norm": "rms"},
    "gate": {"op": "gate", "shape": ODD},
    "both": {"op": "both", "shape": ODD},
    "both-layer": {"op": "both", "shape": ODD, "norm": "layer"},
    "both-rms": {"op": "both", "shape": ODD, "norm": "rms"},
    "aligned": {"op": "affine", "shape": ODD, "leaf": "aligned"},
    "chunk-both-layer": {"op": "both", "shape": ODD, "leaf": "chunk", "norm": "layer"},
    "chunk-first": {"op": "affine", "shape": MAP, "leaf": "chunk", "channel_dim": 1},
    "aligned-group": {
        "op": "affine", "shape": MAP, "leaf": "aligned", "norm": "group", "groups": 2,
        "channel_dim": 1,
    },
    "rows": {"op": "affine", "shape": ODD, "leaf": "rows"},
    "rows-both-layer": {"op": "both", "shape": ODD, "leaf": "rows", "norm": "layer"},
    "rows-gate": {"op": "gate", "shape": ODD, "leaf": "rows", "index_dtype": torch.int32},
    "rows-group": {
        "op": "affine", "shape": MAP, "leaf": "rows", "norm": "group", "groups": 3,
        "channel_dim": 1,
    },
    "rows-map": {"op": "both", "shape": MAP, "leaf": "rows", "norm": "rms", "channel_dim": 1},
    "first": {"op": "affine", "shape": MAP, "channel_dim": 1},
    "first-gate": {"op": "gate", "shape": MAP, "channel_dim": 1},
    "first-layer": {"op": "affine", "shape": MAP, "norm": "layer", "channel_dim": 1},
    "first-group": {
        "op": "affine", "shape": MAP, "norm": "group", "groups": 3, "channel_dim": 1,
    },
    "first-instance": {
        "op": "affine", "shape": MAP, "norm": "group", "groups": 6, "channel_dim": 1,
    },
    "channels-last": {
        "op": "affine", "shape": MAP, "norm": "group", "groups": 3, "channel_dim": 1,
        "layout": channels_last,
    },
    "channels-last-both": {
        "op": "both", "shape": MAP, "norm": "layer", "channel_dim": 1, "layout": channels_last,
    },
    "transposed": {"op": "both", "shape": ODD, "norm": "layer", "layout": transposed},
    "swapped": {
        "op": "affine", "shape": MAP, "norm": "rms", "channel_dim": 1,
        "layout": swapped_positions,
    },
    "every-second": {"op": "affine", "shape": ODD, "norm": "layer", "layout": every_second},
    "no-positions": {"op": "both", "shape": (3, 37), "norm": "layer"},
    "no-positions-rows": {"op": "affine", "shape": (3, 37), "leaf": "rows", "norm": "layer"},
    "one-position": {"op": "affine", "shape": (1, 1, 37), "norm": "layer"},
    "one-channel": {"op": "affine", "shape": (2, 5, 1), "norm": "rms"},
    "many-positions": {"op": "affine", "shape": (1, 3000, 5), "norm": "layer"},
    "many-positions-gate-rows": {"op": "gate", "shape": (1, 3000, 3), "leaf": "rows"},
    "many-positions-group": {
        "op": "affine", "shape": (1, 4, 70, 50), "norm": "group", "groups": 2, "channel_dim": 1,
    },
    "long-line-layer": {"op": "affine", "shape": (1, 1, 8200), "norm": "layer"},
    "long-line-both-rms": {
        "op": "both", "shape": (1, 1, 8200), "norm": "rms", "leaf": "rows", "rows": 1,
    },
    "long-line-first": {
        "op": "affine", "shape": (1, 600, 17), "norm": "layer", "leaf": "aligned",
        "channel_dim": 1,
    },
    "empty-batch": {"op": "both", "shape": (0, 7, 37), "norm": "layer"},
    "empty-positions": {"op": "both", "shape": (2, 0, 37), "norm": "layer"},
    "empty-positions-rows": {"op": "affine", "shape": (2, 0, 37), "leaf": "rows"},
    "empty-group": {
        "op": "affine", "shape": (2, 6, 0, 3), "norm": "group", "groups": 3, "channel_dim": 1,
    },
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def chosen(request, case):
    return case(**request.param)


def with_gradients(outputs, inputs, dtype=None):
    """Outputs and gradients, for upstream gradients that are exact in `dtype`."""
    rng = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(out.shape, generator=rng).to(out.device, dtype or out.dtype).to(out.dtype)
        for out in outputs
    ]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


def found_of(problem):
    return with_gradients(problem.run(), problem.inputs)


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_outputs_and_gradients_are_those_of_the_formula(chosen, make, dtype):
    problem = make(chosen, dtype)
    found = found_of(problem)
    wide = [tensor.detach().double().requires_grad_() for tensor in problem.inputs]
    wanted = with_gradients(problem.reference(*wide), wide, dtype)
    assert [part.shape for part in found] == [part.shape for part in wanted]
    assert {part.dtype for part in found} == {dtype}
    for part, right in zip(found, wanted, strict=True):
        if part.numel():
            error = (part.double() - right).abs().max() / right.abs().max().clamp(min=1)
            assert error <= BOUNDS[dtype]


SUMMED = (
    "affine affine-layer affine-group both-layer chunk-both-layer rows-both-layer rows-group "
    "first-group long-line-layer many-positions many-positions-gate-rows many-positions-group"
)


@pytest.mark.parametrize("name", SUMMED.split())
def test_the_same_call_gives_the_same_bits(name, case, make):
    problem = make(case(**CASES[name]), torch.float32)
    pairs = zip(found_of(problem), found_of(problem), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
