"""Further modulators that break a law in ways that look right, and the law catches each."""

import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from condmod.functional import ScaleShift
from condmod.testing import MODULATOR_LAWS

_FOUND = importlib.util.spec_from_file_location(
    "condmod_broken_modulators", Path(__file__).with_name("test_broken.py")
)
broken = importlib.util.module_from_spec(_FOUND)
sys.modules[_FOUND.name] = broken  # its classes are pickled by this name
_FOUND.loader.exec_module(broken)


class GammaBeta(NamedTuple):
    """Other names than ours for scale and shift."""

    gamma: Tensor
    beta: Tensor


class Weight(NamedTuple):
    """A scale alone, as it is to be multiplied."""

    weight: Tensor


def parts(self, condition):
    return self.proj(self.accept(condition)).chunk(2, -1)


def generate_gamma_beta(self, condition):
    return GammaBeta(*parts(self, condition))


def modulate_half(self, x, modulation):
    gamma, beta = (broken.silent(x, leaf).to(x.dtype) for leaf in modulation)
    return x * (1 + gamma) + beta


def generate_weight(self, condition):
    return Weight(parts(self, condition)[0])


def modulate_weight_half(self, x, modulation):
    return x * (1 + broken.silent(x, modulation.weight).to(x.dtype))


def modulate_minus_half(self, x, modulation):
    gamma, beta = (broken.silent(x, leaf).to(x.dtype) for leaf in modulation)
    return x * (1 - gamma) + beta


def modulate_exp_half(self, x, modulation):
    gamma, beta = (broken.silent(x, leaf).to(x.dtype) for leaf in modulation)
    return x * gamma.exp() + beta


def formed(form):
    """A form that is computed in generate, in the dtype of the parameters."""

    def generate(self, condition):
        scale, shift = parts(self, condition)
        return ScaleShift(form(scale), shift)

    return generate


def modulate_raw(self, x, modulation):
    scale, shift = (broken.silent(x, leaf).float() for leaf in modulation)
    return (x * scale + shift).to(x.dtype)


def generate_tensor(self, condition):
    return self.proj(self.accept(condition))


def modulate_tensor(self, x, modulation):
    return broken.affine(x, modulation.chunk(2, -1))


def generate_plain_tuple(self, condition):
    return tuple(parts(self, condition))


def generate_nested_plain_tuple(self, condition):
    return GammaBeta(tuple(parts(self, condition)), parts(self, condition)[1])


def prepared_buffer(self):
    self.register_buffer("window", torch.full((6,), 0.5))


def prepared_hidden_buffer(self):
    self.register_buffer("window", torch.full((6,), 0.5), persistent=False)


def modulate_window(self, x, modulation):
    return broken.affine(x * self.window.to(x.dtype), modulation)


def modulate_transposed(self, x, modulation):
    y = broken.affine(x, modulation)
    return y.movedim(-1, 0).contiguous().movedim(0, -1)


def modulate_view(self, x, modulation):
    return broken.affine(x.view(-1).view(x.shape), modulation)


def modulate_by_batch(self, x, modulation):
    return broken.affine(x, modulation) * {2: 1.0}.get(int(x.shape[0]), 1.0)


def reset_skips_nan(self):
    nn.init.normal_(self.proj.weight)
    self.proj.bias.data.mul_(0)  # 0 times whatever the memory held


FURTHER = {
    "1 + gamma in bfloat16": (
        "precision",
        {"generate": generate_gamma_beta, "modulate": modulate_half},
    ),
    "1 + weight in bfloat16, alone": (
        "precision",
        {"generate": generate_weight, "modulate": modulate_weight_half},
    ),
    "1 - gamma in bfloat16": (
        "precision",
        {"generate": generate_gamma_beta, "modulate": modulate_minus_half},
    ),
    "exp(gamma) in bfloat16": (
        "precision",
        {"generate": generate_gamma_beta, "modulate": modulate_exp_half},
    ),
    "exp in generate": (
        "precision",
        {"generate": formed(torch.exp), "modulate": modulate_raw},
    ),
    "sigmoid in generate": (
        "precision",
        {"generate": formed(torch.sigmoid), "modulate": modulate_raw},
    ),
    "1 + s in generate": (
        "precision",
        {"generate": formed(lambda s: 1 + s), "modulate": modulate_raw},
    ),
    "a bare tensor": (
        "modulation_tree",
        {"generate": generate_tensor, "modulate": modulate_tensor},
    ),
    "a plain tuple": (
        "modulation_tree",
        {"generate": generate_plain_tuple, "modulate": modulate_half},
    ),
    "a plain tuple inside": ("modulation_tree", {"generate": generate_nested_plain_tuple}),
    "a buffer filled once": ("reset", {"prepared": prepared_buffer, "modulate": modulate_window}),
    "a bias multiplied by zero": ("reset", {"reset_parameters": reset_skips_nan}),
    "a buffer lost on meta": (
        "meta",
        {"prepared": prepared_hidden_buffer, "modulate": modulate_window},
    ),
    "another memory layout": ("shape", {"modulate": modulate_transposed}),
    "a view of the features": ("shape", {"modulate": modulate_view}),
    "a graph for each batch": ("recompiles", {"modulate": modulate_by_batch}),
}


@pytest.mark.parametrize("what", FURTHER)
def test_a_law_catches(what):
    law, changes = FURTHER[what]
    case = broken.case_of(broken.good(**changes))
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        MODULATOR_LAWS[law](case)
    assert "no component is called" not in str(caught.value)


def test_forms_applied_in_float32_keep_the_law_of_precision():
    def exp_in_modulate(self, x, modulation):
        scale, shift = (broken.silent(x, leaf).float() for leaf in modulation)
        return (x * scale.exp() + shift).to(x.dtype)

    def weight_in_modulate(self, x, modulation):
        return (x * (1 + broken.silent(x, modulation.weight).float())).to(x.dtype)

    MODULATOR_LAWS["precision"](broken.case_of(broken.good(modulate=exp_in_modulate)))
    single = {"generate": generate_weight, "modulate": weight_in_modulate}
    MODULATOR_LAWS["precision"](broken.case_of(broken.good(**single)))
