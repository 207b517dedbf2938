"""A component of one kind of condition alone keeps every law, without a condition of its own."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from condmod import ConditionError, Modulator, ModulatorConfig, Registry, Site
from condmod.functional import ScaleShift, blank_linear, featurewise_affine
from condmod.testing import MODULATOR_LAWS, ModulatorCase


def init(self, config, site):
    Modulator.__init__(self, config, site)
    self.proj = blank_linear(self.condition_dim, 2 * site.features)
    self.reset_parameters()


def modulate(self, x, modulation):
    return featurewise_affine(x, modulation, self.site.channel_dim, where=self.where)


AFFINE = {
    "__init__": init,
    "reset_parameters": lambda self: self.proj.reset_parameters(),
    "generate": lambda self, c: ScaleShift(*self.proj(self.accept(c)).chunk(2, -1)),
    "modulate": modulate,
}


class Options(ModulatorConfig):
    """No options."""


class AlignedOptions(Options):
    """No options."""


class GlobalOptions(Options):
    """No options."""


class SelfOptions(Options):
    """No options."""


def body(name, config, kind):
    return {
        "name": name,
        "Config": config,
        "kinds": frozenset({kind}),
        "__module__": __name__,
        "__doc__": "A component of one kind.",
    }


AlignedOnly = type(Modulator)(
    "AlignedOnly", (Modulator,), {**AFFINE, **body("test.only_aligned", AlignedOptions, "aligned")}
)
GlobalOnly = type(Modulator)(
    "GlobalOnly", (Modulator,), {**AFFINE, **body("test.only_global", GlobalOptions, "global")}
)


class Nothing(NamedTuple):
    """No condition, no modulation."""


class SelfOnly(Modulator):
    """Squeeze and excitation without a squeeze: y = x·σ(W·x + b), from the features alone."""

    name = "test.only_self"
    Config = SelfOptions
    kinds = frozenset({"self"})
    site_params = True

    def __init__(self, config, site):
        super().__init__(config, site)
        self.proj = blank_linear(site.features, site.features)
        self.reset_parameters()

    def reset_parameters(self):
        self.proj.reset_parameters()

    def generate(self, condition):
        if condition is not None:
            raise ConditionError(f"{self.where} takes no condition")
        return Nothing()

    def modulate(self, x: Tensor, modulation):
        gate = self.proj(x.movedim(self.site.channel_dim, -1)).sigmoid()
        return (x * gate.movedim(-1, self.site.channel_dim)).to(x.dtype).contiguous()


def affine(state, x, condition):
    parts = condition @ state["proj.weight"].T + state["proj.bias"]
    scale, shift = parts.reshape(len(x), *[1] * (x.ndim - parts.ndim), *parts.shape[1:]).chunk(
        2, -1
    )
    return (1 + scale) * x + shift


def excitation(state, x, condition):
    return x * torch.sigmoid(x @ state["proj.weight"].T + state["proj.bias"])


def first(reference):
    def moved(state, x, condition):
        if condition is not None and condition.ndim > 2:
            condition = condition.movedim(1, -1)
        return reference(state, x.movedim(1, -1), condition).movedim(-1, 1)

    return moved


def cases():
    rows = ((AlignedOnly, affine, 4), (GlobalOnly, affine, 4), (SelfOnly, excitation, None))
    for cls, reference, width in rows:
        registry = Registry([])
        registry.register(cls)
        for dim in (-1, 1):
            yield ModulatorCase(
                cls.name,
                Site(6, width, channel_dim=dim, name="here"),
                reference if dim == -1 else first(reference),
                registry=registry,
                label=cls.name,
            )


CASES = {case.name: case for case in cases()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("law", MODULATOR_LAWS)
def test_a_component_of_one_kind_keeps_every_law(name, law):
    MODULATOR_LAWS[law](CASES[name])


def test_the_condition_follows_the_kind():
    shapes = {}
    for name, case in CASES.items():
        _, condition = case.inputs(3, (5, 2))
        shapes[name] = None if condition is None else tuple(condition.shape)
    assert shapes == {
        "test.only_aligned-last": (3, 5, 2, 4),
        "test.only_aligned-first": (3, 4, 5, 2),
        "test.only_global-last": (3, 4),
        "test.only_global-first": (3, 4),
        "test.only_self-last": None,
        "test.only_self-first": None,
    }


def test_a_kind_without_a_default_condition_says_that_the_case_needs_one():
    class SetOptions(ModulatorConfig):
        """No options."""

    cls = type(Modulator)(
        "SetOnly", (Modulator,), {**AFFINE, **body("test.only_set", SetOptions, "set")}
    )
    registry = Registry([])
    registry.register(cls)
    case = ModulatorCase("test.only_set", Site(6, 4), affine, registry=registry)
    with pytest.raises(ValueError, match=r"takes \['set'\]: its case needs `condition`"):
        case.inputs()


def test_a_law_that_does_not_apply_skips_with_its_reason():
    case = CASES["test.only_global-last"]
    for law, reason in {
        "identity": "it has no option init",
        "aligned": "it takes one kind of condition: global",
    }.items():
        with pytest.raises(pytest.skip.Exception, match=reason):
            MODULATOR_LAWS[law](case)
