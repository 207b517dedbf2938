"""A component that reads its sublayer's weight and changes the width keeps every law."""

import pytest
import torch
from torch import Tensor, nn

from condmod import ModulatorConfig, Registry, Site, SiteError, SublayerModulator
from condmod.functional import Scale, blank_linear, featurewise_scale
from condmod.testing import MODULATOR_LAWS, ModulatorCase


class Options(ModulatorConfig):
    """No options."""


class Rows(SublayerModulator):
    """y = (1 + s)·f(x)/|W|, with the length of each row of f's weight W."""

    name = "test.rows"
    Config = Options
    kinds = frozenset({"global"})
    reads_weight = True
    changes_width = True

    def __init__(self, config, site):
        SublayerModulator.__init__(self, config, site)  # its body makes other classes too
        self.proj = blank_linear(self.condition_dim, site.out_features)
        self.reset_parameters()

    def reset_parameters(self):
        self.proj.reset_parameters()

    def generate(self, condition):
        return (Scale(self.proj(self.accept(condition))),)

    def enter(self, x, modulation, sublayer):
        self.check_channels(x)
        if not isinstance(sublayer, nn.Linear):
            raise SiteError(f"{self.where()} is around a Linear; got {sublayer}")
        return x

    def exit(self, x: Tensor, y: Tensor, modulation, sublayer):
        length = sublayer.weight.norm(dim=1).to(y.dtype)
        return featurewise_scale(y / length, modulation.scale, where=self.where)


def naive(state, x, condition, layer):
    scale = condition @ state["proj.weight"].T + state["proj.bias"]
    scale = scale.reshape(len(x), *[1] * (x.ndim - 2), -1)
    length = (layer.weight * layer.weight).sum(1).sqrt()
    return (1 + scale) * (x @ layer.weight.T + layer.bias) / length


def layer():
    return nn.Linear(6, 8)


def case_of(cls):
    registry = Registry([])
    registry.register(cls)
    site = Site(6, 4, out_features=8, name="here")
    return ModulatorCase(cls.name, site, naive, sublayer=layer, registry=registry, label="rows")


CASE = case_of(Rows)


@pytest.mark.parametrize("law", MODULATOR_LAWS)
def test_it_keeps_every_law(law):
    MODULATOR_LAWS[law](CASE)


def test_the_layer_has_the_same_weight_each_time_and_in_every_dtype():
    torch.manual_seed(0)
    drawn = torch.randn(1)
    torch.manual_seed(0)
    (first,) = CASE.sublayers()
    assert torch.equal(torch.randn(1), drawn), "making the layer draws from the caller's numbers"
    assert first is CASE.sublayers()[0]
    for dtype in (torch.float64, torch.bfloat16):
        (other,) = CASE.sublayers(dtype)
        assert other.weight.dtype == dtype
        assert torch.equal(other.weight.double(), first.weight.double())
        assert not other.weight.requires_grad


def test_the_output_is_what_the_layer_gives():
    x, _ = CASE.inputs(3, (5,))
    assert CASE.output(x).shape == (3, 5, 8)


def cropped(self, x, y, modulation, sublayer):
    return Rows.exit(self, x, y, modulation, sublayer)[..., : x.shape[-1]]


def lengths_in_half(self, x, y, modulation, sublayer):
    length = sublayer.weight.bfloat16().norm(dim=1).to(y.dtype)
    return featurewise_scale(y / length, modulation.scale, where=self.where)


def any_sublayer(self, x, modulation, sublayer):
    self.check_channels(x)
    return x


def without_weight(self, x, y, modulation, sublayer):
    weight = getattr(sublayer, "weight", None)
    if weight is not None:
        return Rows.exit(self, x, y, modulation, sublayer)
    return y


BROKEN = {
    "it gives the width that it read": ("shape", "became", {"exit": cropped}),
    "it reads the weight in bfloat16": ("reference", "differs by", {"exit": lengths_in_half}),
    "a function passes as a layer": (
        "bad_shapes",
        "a function, which has no weight: no error",
        {"enter": any_sublayer, "exit": without_weight},
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_law_catches(what):
    law, said, changes = BROKEN[what]
    options = type(ModulatorConfig)(
        "BrokenOptions", (ModulatorConfig,), {"__module__": __name__, "__doc__": "No options."}
    )
    body = {key: value for key, value in vars(Rows).items() if key not in ("__dict__", "Config")}
    named = {"name": "test.broken_rows", "Config": options}
    case = case_of(type(SublayerModulator)("Broken", (SublayerModulator,), body | named | changes))
    with pytest.raises(AssertionError, match=said):
        MODULATOR_LAWS[law](case)
