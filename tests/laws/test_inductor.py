"""Inductor compiles one component of each family, forward and backward."""

import shutil

import pytest
import torch

from condmod import create
from condmod.testing.common import check_compile

pytestmark = [
    pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")),
        reason="inductor on a CPU needs a C++ compiler",
    ),
    # inductor itself imports what torch has deprecated
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
PLACE = {"features": 16, "channel_dim": 1}


@pytest.mark.parametrize(
    ("spec", "place", "condition", "sublayers"),
    [
        ("dense_film", {"condition_dim": 8}, (3, 8), ()),
        ("adaln_zero(parts=1)", {"condition_dim": 8}, (3, 8), (torch.tanh,)),
        ("add(activation='silu')", {"condition_dim": 8}, (3, 8), ()),
        ("per_timestep(inner=film, encoder=timestep(dim=32))", {}, (3,), ()),
        ("multi_condition(encoder=fuse(inputs={'s': scalar(dim=8)}, dim=8))", {}, (3,), ()),
        ("spade(hidden=8)", {"condition_dim": 8}, (3, 8, 3, 3), ()),
        ("squeeze_excite", {}, None, ()),
        ("gpocm", {"condition_dim": 8}, (3, 8), ()),
        ("tfilm(block=2)", {}, None, ()),
        ("stylegan2", {"condition_dim": 8}, (3, 8), (torch.nn.Conv2d(16, 16, 1),)),
        ("cross_attention(heads=2)", {"condition_dim": 8}, (3, 6, 8), ()),
    ],
)
def test_inductor_equals_eager(spec, place, condition, sublayers):
    torch.manual_seed(0)
    module = create(spec, **PLACE, **place)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    positions = (20,) if "tfilm" in spec else (5, 4)
    x, c = torch.randn(3, 16, *positions), None if condition is None else torch.rand(condition)
    given = {"s": c} if "fuse" in spec else c
    check_compile(module, lambda m: m(x, given, *sublayers), backend="inductor")
