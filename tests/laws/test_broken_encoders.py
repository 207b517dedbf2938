"""For each law of an encoder, an encoder that breaks it, and the law catches it."""

import itertools

import pytest
import torch
from pydantic import Field
from torch import nn

from condmod import Encoder, NullableConfig, Registry
from condmod.functional import blank_linear
from condmod.testing import ENCODER_LAWS, EncoderCase

counter = itertools.count()


def init(self, config, out_dim):
    Encoder.__init__(self, config, out_dim or 6)
    self.proj = blank_linear(3, self.out_dim)
    self.prepared()
    self.reset_parameters()


def reset_parameters(self):
    self.proj.reset_parameters()
    self.reset_null()


def encode(self, signal):
    shapes = {2: "(B, 3)", 3: "(B, T, 3)"}
    return self.proj(self.read(signal, shapes).to(self.dtype))


GOOD = {
    "__init__": init,
    "prepared": lambda self: None,
    "reset_parameters": reset_parameters,
    "encode": encode,
}


def good(config=NullableConfig, **changes):
    """A right encoder, one Linear with a null, with some of its methods replaced."""
    number = next(counter)
    here = {"__module__": __name__, "__doc__": "Options."}
    globals()[f"Options{number}"] = options = type(config)(f"Options{number}", (config,), here)
    named = {"name": f"test.encoder{number}", "Config": options, **here}
    cls = type(Encoder)(f"Encoder{number}", (Encoder,), {**GOOD, **named, **changes})
    globals()[f"Encoder{number}"] = cls
    return cls


def signal(batch, positions, dtype):
    draw = torch.Generator().manual_seed(2)
    return torch.randn(batch, *positions, 3, generator=draw, dtype=torch.float64).to(dtype)


def naive(state, value):
    return value @ state["proj.weight"].T + state["proj.bias"]


def case_of(cls):
    registry = Registry([])
    registry.register(cls)
    return EncoderCase(
        f"{cls.name}(nullable=True)", signal, naive, 5, registry=registry, label="case"
    )


# --- one broken encoder for each law ------------------------------------------------------


def encode_double(self, signal):
    return encode(self, signal).double()


def encode_batch_mean(self, signal):
    out = encode(self, signal)
    return out - out.mean(0, keepdim=True)


def encode_positions_twice(self, signal):
    out = encode(self, signal)
    return out if out.ndim == 2 else out * 2


def reset_forgets_null(self):
    self.proj.reset_parameters()


class OtherText(NullableConfig):
    """Prints another config."""

    def __str__(self):
        return self.component_name()


class Unbounded(NullableConfig):
    """An integer without bounds."""

    width: int = Field(1, description="Unused.")


def prepared_spare(self):
    self.spare = nn.Parameter(torch.zeros(2))


def present_is_ignored(self, out, present):
    return out + 0 * self.null


class Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad


def encode_wrong_gradient(self, signal):
    return Detached.apply(encode(self, signal))


def encode_large_numbers_in_the_modules_dtype(self, signal):
    value = signal.value.to(self.dtype)
    return self.proj((value + 1000.0) - 1000.0)


def encode_breaks_graph(self, signal):
    out = encode(self, signal)
    return out * (2 if float(out.detach().sum()) > 1e9 else 1)


def encode_by_batch(self, signal):
    out = encode(self, signal)
    return out * {1: 1.0, 2: 1.0}.get(int(out.shape[0]), 1.0)


hidden = {}


def prepared_hides_state(self):
    hidden[id(self)] = self.proj.weight


def encode_from_hidden_state(self, signal):
    return encode(self, signal) * (1 if id(self) in hidden else 2)


def encode_from_hidden_weight(self, signal):
    weight = hidden.get(id(self), self.proj.weight)
    return nn.functional.linear(signal.value.to(self.dtype), weight, self.proj.bias)


def prepared_on_cpu(self):
    self.proj.weight = nn.Parameter(torch.empty(self.proj.weight.shape, device="cpu"))


def encode_negative(self, signal):
    return -encode(self, signal)


BROKEN = {
    "shape": {"encode": encode_double},
    "rows": {"encode": encode_batch_mean},
    "aligned": {"encode": encode_positions_twice},
    "reset": {"reset_parameters": reset_forgets_null},
    "round_trip": {"config": OtherText},
    "options": {"config": Unbounded},
    "gradients": {"prepared": prepared_spare},
    "absence": {"_or_null": present_is_ignored},
    "gradcheck": {"encode": encode_wrong_gradient},
    "precision": {"encode": encode_large_numbers_in_the_modules_dtype},
    "compiled": {"encode": encode_breaks_graph},
    "recompiles": {"encode": encode_by_batch},
    "exported": {"encode": encode_breaks_graph},
    "copies": {"encode": encode_from_hidden_state, "prepared": prepared_hides_state},
    "functional_call": {"encode": encode_from_hidden_weight, "prepared": prepared_hides_state},
    "meta": {"prepared": prepared_on_cpu},
    "reference": {"encode": encode_negative},
}


@pytest.mark.parametrize("law", ENCODER_LAWS)
def test_the_unbroken_encoder_keeps_every_law(law):
    ENCODER_LAWS[law](case_of(good()))


def test_every_law_has_an_encoder_that_breaks_it():
    assert set(BROKEN) == set(ENCODER_LAWS)


@pytest.mark.parametrize("law", BROKEN)
def test_a_law_catches_the_encoder_that_breaks_it(law):
    case = case_of(good(**BROKEN[law]))
    with pytest.raises((AssertionError, pytest.fail.Exception, RuntimeError)) as caught:
        ENCODER_LAWS[law](case)
    assert "no component is called" not in str(caught.value)


# --- further ways to break a law -------------------------------------------------------------


def prepared_dead(self):
    self.dead = nn.Parameter(torch.ones(2))


def encode_dead(self, signal):
    return encode(self, signal) + 0 * self.dead.sum()


def prepared_buffer(self):
    self.register_buffer("mean", torch.full((3,), 0.5))


def prepared_hidden_buffer(self):
    self.register_buffer("mean", torch.full((3,), 0.5), persistent=False)


def encode_centred(self, signal):
    return self.proj(signal.value.to(self.proj.weight.dtype) - self.mean)


def encode_float32(self, signal):
    return nn.functional.linear(
        signal.value.float(), self.proj.weight.float(), self.proj.bias.float()
    ).to(self.out)


def to_float32(self):
    self.out = torch.float32


FURTHER = {
    "a parameter times zero": ("gradients", {"prepared": prepared_dead, "encode": encode_dead}),
    "a buffer filled once": ("reset", {"prepared": prepared_buffer, "encode": encode_centred}),
    "a buffer lost on meta": (
        "meta",
        {"prepared": prepared_hidden_buffer, "encode": encode_centred},
    ),
    "float32 whatever the parameters": (
        "functional_call",
        {"prepared": to_float32, "encode": encode_float32},
    ),
}


@pytest.mark.parametrize("what", FURTHER)
def test_a_law_catches(what):
    law, changes = FURTHER[what]
    with pytest.raises(AssertionError):
        ENCODER_LAWS[law](case_of(good(**changes)))


class Sinusoid(NullableConfig):
    """No options but a null."""


class BrokenSinusoid(Encoder):
    """Angles in the dtype of the parameters, which cannot tell 937 from 936 in bfloat16."""

    name = "test.sinusoid"
    Config = Sinusoid
    wide = False

    def __init__(self, config, out_dim):
        super().__init__(config, out_dim or 6)
        self.proj = blank_linear(6, self.out_dim)
        self.reset_parameters()

    def reset_parameters(self):
        self.proj.reset_parameters()
        self.reset_null()

    def encode(self, signal):
        dtype = self.proj.weight.dtype
        time = signal.value.to(torch.promote_types(dtype, torch.float32) if self.wide else dtype)
        angle = time[..., None] * 100.0 ** (-torch.arange(3) / 3).to(time.dtype)
        return self.proj(torch.cat([angle.cos(), angle.sin()], -1).to(dtype))


@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
@pytest.mark.parametrize("wide", [True, False])
def test_precision_brings_large_times_itself(monkeypatch, wide, kind):
    monkeypatch.setattr(BrokenSinusoid, "wide", wide)
    registry = Registry([])
    registry.register(BrokenSinusoid)

    def small_times(batch, positions, dtype):
        return torch.arange(batch).to(kind) / 1 if kind.is_floating_point else torch.arange(batch)

    case = EncoderCase("test.sinusoid", small_times, naive, registry=registry)
    if wide:
        ENCODER_LAWS["precision"](case)
    else:
        with pytest.raises(AssertionError, match=r"in a module of torch\.bfloat16"):
            ENCODER_LAWS["precision"](case)
