"""The passes over the features: formulas, shapes, precision, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from condmod import ShapeError
from condmod.functional import (
    add_shift,
    align,
    blank_linear,
    featurewise_affine,
    gated_residual,
    layer_norm,
    reset_chunks,
)


def test_featurewise_affine_is_one_plus_scale_by_default():
    x, scale, shift = torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 4)
    want = (1 + scale[:, None]) * x + shift[:, None]
    torch.testing.assert_close(featurewise_affine(x, (scale, shift)), want)


FORMS = {
    "raw": lambda s: s,
    "one_plus": lambda s: 1 + s,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "one_plus_tanh": lambda s: 1 + s.tanh(),
}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_scale_is_read_in_its_form(form, residual):
    x, scale, shift = torch.randn(2, 4, 5, 6), torch.randn(2, 4), torch.randn(2, 4)
    want = FORMS[form](scale)[..., None, None] * x + shift[..., None, None]
    got = featurewise_affine(x, (scale, shift), 1, form=form, residual=residual)
    torch.testing.assert_close(got, want + x if residual else want)


@pytest.mark.parametrize(("form", "want"), [("exp", 1.0010005), ("sigmoid", 0.50025)])
def test_a_small_scale_in_bfloat16_keeps_its_effect_on_float32_features(form, want):
    low = torch.full((1, 1), 1e-3, dtype=torch.bfloat16)
    y = featurewise_affine(torch.ones(1, 1), (low, torch.zeros_like(low)), form=form)
    assert abs(y.item() - want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_features_that_are_not_floating_are_refused(dtype):
    x = torch.ones(2, 4, dtype=dtype)
    with pytest.raises(ShapeError, match=f"features are floating; got {dtype}"):
        featurewise_affine(x, (torch.zeros(2, 4),) * 2)


def test_a_condition_as_long_as_the_batch_is_never_taken_for_positions():
    x = torch.randn(5, 5, 4)
    scale = torch.randn(5, 4)
    got = featurewise_affine(x, (scale, torch.zeros(5, 4)))
    torch.testing.assert_close(got, (1 + scale[:, None, :]) * x)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 4),
    positions=st.lists(st.integers(1, 4), max_size=3),
    channels=st.integers(1, 5),
    first=st.booleans(),
    aligned=st.booleans(),
)
def test_a_leaf_aligns_with_any_features_it_belongs_to(batch, positions, channels, first, aligned):
    x = torch.zeros(batch, *positions, channels)
    leaf = torch.randn(batch, *(positions if aligned else ()), channels)
    wide = leaf if aligned else leaf.reshape(batch, *[1] * len(positions), channels)
    want = x + wide
    if first:
        x, want = x.movedim(-1, 1), want.movedim(-1, 1)
    dim = 1 if first else -1
    view = align(x, leaf, dim)
    assert view.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()
    assert torch.equal(x + view, want)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    x=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    leaf=st.lists(st.integers(1, 3), min_size=1, max_size=4),
)
def test_a_leaf_of_any_other_shape_is_refused(x, leaf):
    features, modulation = torch.zeros(x), torch.zeros(leaf)
    if leaf in ([x[0], x[-1]], x):
        align(features, modulation)
        return
    with pytest.raises(ShapeError):
        align(features, modulation)


def test_the_error_says_both_shapes_and_the_place():
    with pytest.raises(ShapeError) as caught:
        featurewise_affine(
            torch.zeros(3, 5, 4), (torch.zeros(1, 4),) * 2, where=lambda: "film at 'a'"
        )
    assert str(caught.value) == (
        "modulation (1, 4) does not fit features (3, 5, 4) with channels at dim -1 in film at "
        "'a'; a global one is (B, C), an aligned one has a vector of C per position of the "
        "features, and neither broadcasts"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    torch.manual_seed(0)
    x = torch.randn(64, 8, 16).to(dtype)
    scale, shift = (0.01 * torch.randn(64, 16)).to(dtype), torch.randn(64, 16).to(dtype)
    got = featurewise_affine(x, (scale, shift))
    exact = (1 + scale.double()[:, None]) * x.double() + shift.double()[:, None]
    assert got.dtype == dtype
    assert (got == exact.to(dtype)).float().mean() > 0.999


def test_autocast_modulations_do_not_change_the_features_dtype():
    x = torch.randn(2, 5, 4)
    low = (torch.zeros(2, 4, dtype=torch.bfloat16),) * 2
    assert featurewise_affine(x, low).dtype == torch.float32
    assert gated_residual(x, x.bfloat16(), low[0]).dtype == torch.float32
    assert add_shift(x, low[0]).dtype == torch.float32


def test_gated_residual_is_x_plus_gate_times_y():
    x, y, gate = torch.randn(2, 4, 5), torch.randn(2, 4, 5), torch.randn(2, 4)
    torch.testing.assert_close(gated_residual(x, y, gate, 1), x + gate[..., None] * y)


@pytest.mark.parametrize("dim", [1, -1])
def test_layer_norm_is_over_the_channels_of_each_position(dim):
    x = torch.randn(2, 6, 5, 6)
    want = nn.LayerNorm(6, eps=1e-6, elementwise_affine=False)(x.movedim(dim, -1)).movedim(-1, dim)
    torch.testing.assert_close(layer_norm(x, dim), want)


def test_a_fused_linear_is_drawn_as_separate_ones():
    torch.manual_seed(3)
    parts = [nn.Linear(7, 5) for _ in range(3)]
    torch.manual_seed(3)
    fused = blank_linear(7, 15)
    reset_chunks(fused, 3)
    assert torch.equal(fused.weight, torch.cat([part.weight for part in parts]))
    assert torch.equal(fused.bias, torch.cat([part.bias for part in parts]))
