"""The time family: sinusoids, Fourier features, and modulators that take a raw time."""

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import condmod
from condmod import ConditionError, ShapeError, Signal, SiteError, SpecError

TIMES = torch.tensor([0, 1, 17, 937, 999, 123_456, 1_000_000])


def encoder(spec: str, out_dim: int | None = None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return condmod.create_encoder(spec, out_dim).eval()


def modulator(spec: str, features: int = 6, seed: int = 0, **place: Any) -> Any:
    torch.manual_seed(seed)
    return condmod.create(spec, features=features, **place)


def stirred(module: nn.Module) -> nn.Module:
    """Away from any special start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


# --- timestep ---------------------------------------------------------------------------------


def test_the_default_sinusoid_is_that_of_adm_and_dit() -> None:
    half = 128
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    angle = TIMES[:5].double()[:, None] * frequencies
    expected = torch.cat([angle.cos(), angle.sin()], dim=-1)
    assert torch.allclose(encoder("timestep").double()(TIMES[:5]), expected, rtol=0, atol=1e-12)
    assert torch.allclose(encoder("timestep")(TIMES[:5]).double(), expected, rtol=0, atol=2e-4)


def test_edm_reaches_the_last_period_with_endpoint_and_stops_before_it_without() -> None:
    time = torch.tensor([1.0], dtype=torch.float64)
    index = torch.arange(4, dtype=torch.float64)
    for endpoint in (False, True):
        frequencies = (1 / 10000) ** (index / (4 - endpoint))
        expected = torch.cat([frequencies.cos(), frequencies.sin()])[None]
        out = encoder(f"timestep(dim=8, endpoint={endpoint})").double()(time)
        assert torch.allclose(out, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("spec", "out_dim", "width", "keys"),
    [
        ("timestep(dim=8)", None, 8, []),
        ("timestep(dim=8)", 8, 8, []),
        ("timestep(dim=8)", 5, 5, ["proj.weight", "proj.bias"]),
        (
            "timestep(dim=8, hidden=[6])",
            None,
            6,
            ["hidden.0.weight", "hidden.0.bias", "proj.weight", "proj.bias"],
        ),
        ("timestep(dim=8, nullable=True)", None, 8, ["null"]),
        ("fourier(dim=8)", None, 8, ["features.frequencies"]),
        ("fourier(dim=8, with_input=True)", None, 9, ["features.frequencies"]),
        (
            "fourier(dim=8, form='cos_phase')",
            None,
            8,
            ["features.frequencies", "features.phases"],
        ),
    ],
)
def test_widths_and_state_keys(spec: str, out_dim: int | None, width: int, keys: list[str]) -> None:
    module = encoder(spec, out_dim)
    assert list(module.state_dict()) == keys
    assert module.out_dim == width
    assert module(torch.tensor([1, 2])).shape == (2, width)


def test_a_mask_goes_along() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    out = encoder("timestep(dim=8)")(Signal(torch.rand(2, 3), mask=mask))
    assert torch.equal(out.mask, mask)
    assert out.value.shape == (2, 3, 8)


def test_an_absent_time_is_the_null_whatever_its_value() -> None:
    module = encoder("timestep(dim=8, hidden=[6], nullable=True)")
    present = torch.tensor([True, False])
    out = module(Signal(torch.tensor([3.0, math.nan]), present=present))
    assert torch.allclose(out[0], module(torch.tensor([3.0]))[0], rtol=0, atol=1e-6)
    assert torch.equal(out[1], module.null)
    out.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


@pytest.mark.parametrize("name", ["timestep", "fourier"])
@pytest.mark.parametrize(
    ("signal", "error", "text"),
    [
        (
            torch.tensor([937.0], dtype=torch.bfloat16),
            ConditionError,
            "{name} takes integer, float32 or float64 times; got torch.bfloat16, which has "
            "already rounded them (bfloat16 turns 937 into 936): keep times out of the "
            "conversion to half precision (with FSDP2, cast_forward_inputs=False)",
        ),
        (
            torch.tensor([True]),
            ConditionError,
            "{name} takes integer, float32 or float64 times; got torch.bool",
        ),
        (
            torch.ones(2, 3, 4),
            ShapeError,
            "{name} takes one time per sample, (B,), or per position, (B, T); got (2, 3, 4)",
        ),
        (
            torch.tensor(1),
            ShapeError,
            "{name} takes one time per sample, (B,), or per position, (B, T); got ()",
        ),
        (
            [1, 2],
            ConditionError,
            "{name} takes one tensor, without an index; got list",
        ),
        (
            Signal(torch.ones(2), index=torch.zeros(2)),
            ConditionError,
            "{name} takes one tensor, without an index; got a Signal with an index",
        ),
        (
            Signal(torch.ones(2, 3), mask=torch.ones(2, 2, dtype=torch.bool)),
            ConditionError,
            "{name}: Signal.mask is bool (B, T), one per position; "
            "got torch.bool (2, 2) for an output (2, 3, 8)",
        ),
        (
            Signal(torch.ones(2), mask=torch.ones(2, 1, dtype=torch.bool)),
            ConditionError,
            "{name}: Signal.mask is bool (B, T), one per position; got torch.bool (2, 1) "
            "for an output (2, 8)",
        ),
        (
            Signal(torch.ones(2), present=torch.ones(2, dtype=torch.bool)),
            ConditionError,
            "{name} has no null for an absent signal; declare it with {name}(nullable=True)",
        ),
    ],
)
def test_wrong_times(name: str, signal: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        encoder(f"{name}(dim=8)")(signal)
    assert str(caught.value) == text.format(name=name)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            "timestep(dim=3, endpoint=True)",
            "timestep: endpoint=True needs two frequencies or more, dim >= 4; got dim=3",
        ),
        ("timestep(dim=1)", "timestep: dim should be greater than or equal to 2; got 1"),
        ("timestep(dim=65537)", "timestep: dim should be less than or equal to 65536; got 65537"),
        ("timestep(scale=0.)", "timestep: scale should be greater than 0; got 0.0"),
        (
            "timestep(drop=0.1)",
            "timestep: drop > 0 needs nullable=True: a dropped signal becomes the null",
        ),
        ("fourier(dim=5)", "fourier: form='sin_cos' needs an even dim; got dim=5"),
        ("fourier(std=0.)", "fourier: std should be greater than 0; got 0.0"),
        (
            "timestep_table(steps=0)",
            "timestep_table: steps should be greater than or equal to 1; got 0",
        ),
    ],
)
def test_wrong_options(spec: str, text: str) -> None:
    with pytest.raises(SpecError) as caught:
        condmod.configure(spec)
    assert str(caught.value).splitlines()[0] == text


@pytest.mark.parametrize("time", [torch.tensor([937]), torch.tensor([936.71])])
def test_a_bfloat16_module_computes_its_sinusoid_in_float32(time: Tensor) -> None:
    exact = encoder("timestep")(time)
    assert torch.equal(encoder("timestep").bfloat16()(time), exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", ["", ", learned=True", ", form='cos_phase'"])
def test_frequencies_survive_half_precision(dtype: torch.dtype, options: str) -> None:
    module = encoder(f"fourier(dim=8, hidden=[6]{options})")
    exact = module.features(torch.tensor([0.3, 0.7]))
    kept = copy.deepcopy(module.features.state_dict())
    model = nn.ModuleDict({"time": module}).to(dtype)
    assert model["time"].dtype == model["time"].hidden[0].weight.dtype == dtype
    for name, tensor in module.features.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, kept[name])
    assert torch.equal(module.features(torch.tensor([0.3, 0.7])), exact)
    assert module(torch.tensor([0.3, 0.7])).dtype == dtype


def test_frequencies_survive_half_precision_when_torch_swaps_tensors() -> None:
    module = encoder("fourier(dim=8, learned=True)")
    kept = module.features.frequencies.detach().clone()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(module.features.frequencies, kept)


# --- fourier ----------------------------------------------------------------------------------


def test_edm2_features() -> None:
    module = encoder("fourier(dim=6, form='cos_phase', std=1.)").double()
    f, phi, x = module.features.frequencies, module.features.phases, torch.randn(3).double()
    expected = math.sqrt(2) * torch.cos(2 * math.pi * torch.outer(x, f) + phi)
    assert torch.allclose(module(x), expected, rtol=0, atol=1e-12)
    assert (phi >= 0).all()
    assert (phi < 2 * math.pi).all()


def test_lucidrains_features_put_the_time_first() -> None:
    module = encoder("fourier(dim=6, std=1., with_input=True, learned=True)").double()
    x = torch.randn(3).double()
    angle = 2 * math.pi * torch.outer(x, module.features.frequencies)
    expected = torch.cat([x[:, None], angle.sin(), angle.cos()], dim=-1)
    assert torch.allclose(module(x), expected, rtol=0, atol=1e-12)


def test_fourier_frequencies_have_the_declared_spread_and_train_only_when_learned() -> None:
    fixed, learned = encoder("fourier(dim=4096)"), encoder("fourier(dim=4096, learned=True)")
    assert fixed.features.frequencies.std().item() == pytest.approx(16, rel=0.05)
    assert list(fixed.parameters()) == []
    assert [name for name, _ in learned.named_parameters()] == ["features.frequencies"]


# --- per_timestep -----------------------------------------------------------------------------


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_per_timestep_is_its_inner_modulator_on_the_encoded_time(channel_dim: int) -> None:
    module = modulator("per_timestep(encoder=timestep(dim=8))", channel_dim=channel_dim)
    x = torch.randn(2, 5, 6)
    per_sample, per_frame = torch.tensor([3, 4]), torch.randint(0, 9, (2, 5))
    if channel_dim == -1:
        expected = module.inner(x, module.encoder(per_frame))
        assert torch.equal(module(x, per_frame), expected)
        assert torch.equal(module(x, per_sample), module.inner(x, module.encoder(per_sample)))
    else:
        x = x.movedim(-1, 1)
        encoded = module.encoder(per_frame).movedim(-1, 1)
        assert torch.equal(module(x, per_frame), module.inner(x, encoded))
    repeated = module(x, per_sample[:, None].expand(2, 5))
    assert torch.allclose(module(x, per_sample), repeated, rtol=0, atol=1e-6)


def test_per_timestep_takes_maps_and_masked_frames() -> None:
    module = modulator("per_timestep(encoder=timestep(dim=8))", channel_dim=1)
    assert module(torch.randn(2, 6, 4, 3), torch.tensor([1, 2])).shape == (2, 6, 4, 3)
    mask = torch.tensor([[True, True, False]] * 2)
    time = torch.randint(0, 9, (2, 3))
    x = torch.randn(2, 6, 3)
    assert torch.equal(module(x, Signal(time, mask=mask)), module(x, time))


def test_batch_equal_to_positions_does_not_mix_rows() -> None:
    module = modulator("per_timestep(encoder=timestep(dim=8))")
    x, time = torch.randn(4, 4, 6), torch.arange(4)
    assert torch.allclose(module(x, time)[1], module(x[1:2], time[1:2])[0], rtol=0, atol=1e-6)
    with pytest.raises(ShapeError, match="neither broadcasts"):
        module(torch.randn(4, 6), torch.zeros(4, 4, dtype=torch.long))


def test_per_timestep_is_drawn_encoder_first() -> None:
    spec = "per_timestep(inner=film, encoder=timestep(dim=8, hidden=[4]))"
    module = modulator(spec, seed=3)
    first = encoder("timestep(dim=8, hidden=[4])", seed=3)
    second = condmod.create("film", features=6, condition_dim=4)
    assert torch.equal(module.encoder.proj.weight, first.proj.weight)
    assert torch.equal(module.inner.proj.weight, second.proj.weight)


def test_an_identity_inner_starts_as_the_identity() -> None:
    spec = "per_timestep(inner=film(init='identity'), encoder=timestep(dim=8))"
    x = torch.randn(2, 5, 6)
    assert torch.equal(modulator(spec)(x, torch.tensor([1, 2])), x)


@pytest.mark.parametrize("spec", ["per_timestep", "timestep_table"])
def test_a_condition_dim_is_refused(spec: str) -> None:
    with pytest.raises(SiteError, match=f"{spec} needs no condition_dim"):
        modulator(spec, condition_dim=8)


def test_a_sublayer_modulator_cannot_stand_inside() -> None:
    with pytest.raises(SpecError, match="adaln_zero cannot stand inside"):
        modulator("per_timestep(inner=adaln_zero)")


# --- timestep_table ---------------------------------------------------------------------------


def test_timestep_table_equals_embedding_then_projection() -> None:
    module = modulator("timestep_table(steps=20)")
    embedding, linear = nn.Embedding(20, 9), nn.Linear(9, 12)
    with torch.no_grad():
        module.table.copy_(linear(nn.functional.silu(embedding.weight)))
    x, time = torch.randn(3, 5, 6), torch.tensor([0, 7, 19])
    scale, shift = linear(nn.functional.silu(embedding(time))).chunk(2, dim=-1)
    expected = (1 + scale[:, None]) * x + shift[:, None]
    assert torch.allclose(module(x, time), expected, rtol=0, atol=1e-6)


def test_timestep_table_is_drawn_as_embedding_and_linear_are() -> None:
    module = modulator("timestep_table(steps=20)", seed=5)
    torch.manual_seed(5)
    embedding, linear = nn.Embedding(20, 6), nn.Linear(6, 12)
    assert torch.equal(module.table, linear(nn.functional.silu(embedding.weight)))


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_timestep_table_in_float64(channel_dim: int) -> None:
    module = stirred(modulator("timestep_table(steps=9)", channel_dim=channel_dim)).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    steps = torch.randint(0, 9, (2, 5))
    rows = module.table[steps]
    expected = (1 + rows[..., :6]) * x + rows[..., 6:]
    given = x if channel_dim == -1 else x.movedim(-1, 1)
    out = module(given, steps)
    assert torch.allclose(
        out if channel_dim == -1 else out.movedim(1, -1), expected, rtol=0, atol=1e-12
    )
    repeated = module(given, steps[:, :1].expand(2, 5))
    assert torch.allclose(module(given, steps[:, 0]), repeated, rtol=0, atol=1e-12)


def test_an_identity_table_is_the_identity_and_learns() -> None:
    module = modulator("timestep_table(steps=9, init='identity')")
    x = torch.randn(2, 5, 6)
    out = module(x, torch.tensor([1, 2]))
    assert torch.equal(out, x)
    out.square().sum().backward()
    assert (module.table.grad[1:3] != 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_timestep_table_takes_every_integer(dtype: torch.dtype) -> None:
    module = modulator("timestep_table(steps=9)")
    x, time = torch.randn(2, 6), torch.tensor([8, 0])
    assert torch.equal(module(x, time.to(dtype)), module(x, time))
    assert module(x[:0], time[:0]).shape == (0, 6)


@pytest.mark.parametrize(
    ("time", "error", "text"),
    [
        (
            torch.tensor([1.0]),
            ConditionError,
            "timestep_table at 'b' has one row per integer step; got torch.float32; "
            "a continuous time goes through per_timestep",
        ),
        (
            torch.tensor([9]),
            ConditionError,
            "timestep_table at 'b' has the steps 0 to 8; got 9 to 9",
        ),
        (
            torch.tensor([3, -1]),
            ConditionError,
            "timestep_table at 'b' has the steps 0 to 8; got -1 to 3",
        ),
        (
            torch.zeros(1, 2, 3, dtype=torch.long),
            ShapeError,
            "timestep_table at 'b' takes one step per sample, (B,), or per position, (B, T); "
            "got (1, 2, 3)",
        ),
        (
            Signal(torch.tensor([1]), present=torch.tensor([True])),
            ConditionError,
            "timestep_table at 'b' takes one tensor of steps, without presence or index; "
            "got Signal",
        ),
        (
            {"time": torch.tensor([1])},
            ConditionError,
            "timestep_table at 'b' takes one tensor of steps, without presence or index; got dict",
        ),
    ],
)
def test_wrong_steps(time: Any, error: type[Exception], text: str) -> None:
    module = modulator("timestep_table(steps=9)", name="b")
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        module(torch.randn(1, 6), time)
