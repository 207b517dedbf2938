"""For each law, a modulator that breaks it, and the law catches it."""

import itertools
from typing import Literal, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from condmod import Modulator, ModulatorConfig, Registry, Signal, Site, indexed
from condmod.functional import ScaleShift, blank_linear, featurewise_affine
from condmod.testing import MODULATOR_LAWS, ModulatorCase

SITE = Site(6, 4, name="here")
counter = itertools.count()


def init(self, config, site):
    Modulator.__init__(self, config, site)
    self.proj = blank_linear(site.condition_dim, 2 * site.features)
    self.prepared()
    self.reset_parameters()


def reset_parameters(self):
    nn.init.normal_(self.proj.weight)
    nn.init.zeros_(self.proj.bias)
    if self.config.init == "identity":
        nn.init.zeros_(self.proj.weight)


def generate(self, condition):
    modulation = ScaleShift(*self.proj(self.accept(condition)).chunk(2, -1))
    return indexed(modulation, condition)


def modulate(self, x, modulation):
    return featurewise_affine(x, modulation, self.site.channel_dim, where=self.where)


GOOD = {
    "kinds": frozenset({"global", "aligned", "rows"}),
    "__init__": init,
    "prepared": lambda self: None,
    "reset_parameters": reset_parameters,
    "generate": generate,
    "modulate": modulate,
}


def good(config=ModulatorConfig, **changes):
    """A right modulator, (1 + s)·x + t, with some of its methods replaced; it can be pickled."""
    number = next(counter)
    here = {"__module__": __name__, "__doc__": "Options."}
    options = {"__annotations__": {"init": Literal["published", "identity"]}}
    body = {"init": Field("published", description="How it starts."), **options, **here}
    globals()[f"Config{number}"] = options_class = type(config)(f"Config{number}", (config,), body)
    named = {"name": f"test.case{number}", "Config": options_class, **here}
    cls = type(Modulator)(f"Case{number}", (Modulator,), {**GOOD, **named, **changes})
    globals()[f"Case{number}"] = cls
    return cls


def naive(state, x, condition):
    c = condition @ state["proj.weight"].T + state["proj.bias"]
    scale, shift = c.reshape(len(c), *[1] * (x.ndim - c.ndim), *c.shape[1:]).chunk(2, -1)
    return (1 + scale) * x + shift


def case_of(cls, reference=naive):
    registry = Registry([])
    registry.register(cls)
    return ModulatorCase(cls.name, SITE, reference, registry=registry, label="case")


def affine(x, modulation):
    return featurewise_affine(x, modulation, -1, where="test at 'here'")


class Loose(NamedTuple):
    scale: object
    shift: object


def silent(x, leaf):
    """What broadcasts by chance."""
    return leaf if leaf.ndim == x.ndim else leaf.reshape(len(leaf), *[1] * (x.ndim - 2), -1)


# --- one broken modulator for each law ---------------------------------------------------


def modulate_float64(self, x, modulation):
    return affine(x, modulation).double()


def reset_not_identity(self):
    nn.init.normal_(self.proj.weight)
    nn.init.zeros_(self.proj.bias)


def modulate_two_zeros(self, x, modulation):
    branch = featurewise_affine(x, modulation, -1) - x
    return x + self.gain * branch


def prepared_gain(self):
    self.gain = nn.Parameter(torch.zeros(6))


def reset_forgets_bias(self):
    nn.init.normal_(self.proj.weight, std=0.0 if self.config.init == "identity" else 1.0)


def modulate_batch_mean(self, x, modulation):
    return affine(x - x.mean(0, keepdim=True), modulation)


def generate_position_weighted(self, condition):
    modulation = ScaleShift(*self.proj(self.accept(condition)).chunk(2, -1))
    return modulation if condition.ndim == 2 else ScaleShift(modulation.scale * 2, modulation.shift)


class Unprintable(ModulatorConfig):
    """Prints another config."""

    def __str__(self):
        return f"{self.component_name()}(init='identity')"


class Unbounded(ModulatorConfig):
    """An integer without bounds."""

    width: int = 1
    """Unused."""


class Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad


def modulate_wrong_gradient(self, x, modulation):
    return affine(Detached.apply(x), modulation)


def modulate_half(self, x, modulation):
    scale, shift = (silent(x, leaf) for leaf in modulation)
    return x * (1 + scale.to(x.dtype)) + shift.to(x.dtype)


def modulate_breaks_graph(self, x, modulation):
    return affine(x, modulation) * (2 if float(x.detach().sum()) > 1e9 else 1)


def modulate_by_name(self, x, modulation):
    return affine(x, modulation) * (2 if self.site.name == "nowhere" else 1)


hidden = {}


def prepared_hides_state(self):
    hidden[id(self)] = self.proj.weight


def modulate_from_hidden_state(self, x, modulation):
    return affine(x, modulation) * (1 if id(self) in hidden else 2)


def generate_from_hidden_weight(self, condition):
    weight = hidden.get(id(self), self.proj.weight)
    return ScaleShift(*F.linear(self.accept(condition), weight, self.proj.bias).chunk(2, -1))


def prepared_on_cpu(self):
    self.proj.weight = nn.Parameter(torch.empty(self.proj.weight.shape, device="cpu"))


def generate_other_rows(self, condition):
    if isinstance(condition, Signal) and condition.index is not None:
        condition = condition._replace(index=condition.index.flip(0))
    return generate(self, condition)


def prepare(self, condition):
    return torch.sigmoid(self.accept(condition))


def unpack(self, projected):
    return ScaleShift(*projected.chunk(2, -1))


def generate_none_leaf(self, condition):
    scale, shift = self.proj(self.accept(condition)).chunk(2, -1)
    return Loose(scale, None) if scale.numel() else Loose(scale, shift)


def modulate_none_leaf(self, x, modulation):
    return x * (1 + silent(x, modulation.scale))


def generate_swapped(self, condition):
    return ScaleShift(*self.proj(self.accept(condition)).chunk(2, -1)[::-1])


def modulate_silent(self, x, modulation):
    scale, shift = (silent(x, leaf) for leaf in modulation)
    return x * (1 + scale) + shift


def modulate_expanded(self, x, modulation):
    scale, shift = (silent(x, leaf).expand_as(x).contiguous() for leaf in modulation)
    return torch.addcmul(shift, x, 1 + scale)


BROKEN = {
    "shape": {"modulate": modulate_float64},
    "identity": {"reset_parameters": reset_not_identity},
    "gradients": {"modulate": modulate_two_zeros, "prepared": prepared_gain},
    "reset": {"reset_parameters": reset_forgets_bias},
    "rows": {"modulate": modulate_batch_mean},
    "aligned": {"generate": generate_position_weighted},
    "table": {"generate": generate_other_rows},
    "round_trip": {"config": Unprintable},
    "options": {"config": Unbounded},
    "gradcheck": {"modulate": modulate_wrong_gradient},
    "precision": {"modulate": modulate_half},
    "compiled": {"modulate": modulate_breaks_graph},
    "recompiles": {"modulate": modulate_by_name},
    "exported": {"modulate": modulate_breaks_graph},
    "copies": {"modulate": modulate_from_hidden_state, "prepared": prepared_hides_state},
    "functional_call": {
        "generate": generate_from_hidden_weight,
        "prepared": prepared_hides_state,
    },
    "meta": {"prepared": prepared_on_cpu},
    "split": {"prepare": prepare, "unpack": unpack},
    "modulation_tree": {"generate": generate_none_leaf, "modulate": modulate_none_leaf},
    "reference": {"generate": generate_swapped},
    "bad_shapes": {"modulate": modulate_silent},
    "no_broadcast_copy": {"modulate": modulate_expanded},
}


@pytest.mark.parametrize("law", MODULATOR_LAWS)
def test_the_unbroken_modulator_keeps_every_law(law):
    MODULATOR_LAWS[law](case_of(good()))


def test_every_law_has_a_modulator_that_breaks_it():
    assert set(BROKEN) == set(MODULATOR_LAWS)


@pytest.mark.parametrize("law", BROKEN)
def test_a_law_catches_the_modulator_that_breaks_it(law):
    case = case_of(good(**BROKEN[law]))
    with pytest.raises((AssertionError, pytest.fail.Exception, RuntimeError)) as caught:
        MODULATOR_LAWS[law](case)
    assert "no component is called" not in str(caught.value)


def test_a_waiver_names_a_law_that_exists():
    from condmod.testing import conformance

    case = case_of(good(waivers={"gravity": "it floats"}))
    with pytest.raises(ValueError, match=r"waives unknown laws: \['gravity'\]"):
        conformance([case])


def test_a_waived_law_is_skipped_with_its_reason():
    from condmod.testing import conformance

    case = case_of(good(waivers={"rows": "statistics of the batch"}))
    rows = conformance([case]).args[1]
    waived = [row for row in rows if row.marks]
    assert [row.id for row in waived] == ["case-last-rows"]
    assert waived[0].marks[0].kwargs["reason"] == "statistics of the batch"
