"""The passes over the features: formulas, shapes, precision, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from condmod import ConditionError, ShapeError
from condmod.functional import (
    Indexed,
    add_shift,
    align,
    blank_linear,
    featurewise_affine,
    featurewise_scale,
    gated_residual,
    layer_norm,
    low_rank,
    normalisation,
    reset_chunks,
    reset_constant,
    reset_linears,
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


GATES = {
    "linear": lambda g: g,
    "one_plus": lambda g: 1 + g,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sigmoid_one_minus": lambda g: torch.sigmoid(1 - g),
}


@pytest.mark.parametrize("form", GATES)
def test_a_gate_is_read_in_its_form(form):
    x, y, gate = torch.randn(2, 4, 5), torch.randn(2, 4, 5), torch.randn(2, 4)
    want = x + GATES[form](gate)[..., None] * y
    torch.testing.assert_close(gated_residual(x, y, gate, 1, form=form), want)


@pytest.mark.parametrize("form", FORMS)
def test_a_scale_alone_is_read_in_its_form(form):
    x, scale = torch.randn(2, 5, 4), torch.randn(2, 4)
    want = FORMS[form](scale)[:, None] * x
    torch.testing.assert_close(featurewise_scale(x, scale, form=form), want)


def rms(x):
    return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()


def test_a_norm_comes_before_scale_and_shift_and_on_the_branch_before_its_gate():
    norm = normalisation("rms", 4)
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    scale, shift = torch.randn(2, 4), torch.randn(2, 4)
    wide = (scale[:, None], shift[:, None])
    check = torch.testing.assert_close
    check(featurewise_affine(x, (scale, shift), norm=norm), (1 + wide[0]) * rms(x) + wide[1])
    check(featurewise_scale(x, scale, norm=norm), (1 + wide[0]) * rms(x))
    check(add_shift(x, shift, norm=norm), rms(x) + wide[1])
    check(gated_residual(x, y, scale, norm=norm), x + wide[0] * rms(y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_and_affine_are_rounded_once(dtype):
    torch.manual_seed(0)
    x = torch.randn(64, 8, 16).to(dtype)
    scale, shift = (0.01 * torch.randn(64, 16)).to(dtype), torch.randn(64, 16).to(dtype)
    got = featurewise_affine(x, (scale, shift), norm=normalisation("rms", 16))
    exact = (1 + scale.double()[:, None]) * rms(x.double()) + shift.double()[:, None]
    assert got.dtype == dtype
    assert (got == exact.to(dtype)).float().mean() > 0.999


def test_the_error_of_a_norm_says_the_place():
    norm = normalisation("layer", 4)
    with pytest.raises(ShapeError) as caught:
        featurewise_affine(
            torch.zeros(2, 5, 6), (torch.zeros(2, 4),) * 2, norm=norm, where=lambda: "adaln at 'a'"
        )
    assert str(caught.value) == (
        "the norm is over 4 channels at dim -1; got (2, 5, 6) in adaln at 'a'"
    )


@pytest.mark.parametrize("dim", [1, -1])
def test_an_indexed_leaf_is_a_row_of_the_table_for_each_position(dim):
    rows, index = torch.randn(2, 3, 4), torch.randint(3, (2, 5, 6))
    spelt = torch.stack([rows[sample][index[sample]] for sample in range(2)])
    x = torch.randn(2, 5, 6, 4).movedim(-1, dim)
    got = featurewise_affine(x, (Indexed(rows, index), Indexed(rows + 1, index)), dim)
    torch.testing.assert_close(got, featurewise_affine(x, (spelt, spelt + 1), dim))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_an_index_of_any_integer_type_chooses_rows(dtype):
    rows = torch.randn(1, 3, 4)
    got = align(torch.zeros(1, 2, 4), Indexed(rows, torch.tensor([[2, 0]], dtype=dtype)))
    assert torch.equal(got, rows[:, [2, 0]])


@pytest.mark.parametrize(("index", "got"), [([[0, 3]], "0 to 3"), ([[-1, 2]], "-1 to 2")])
def test_a_row_that_is_not_there_is_refused_with_the_range(index, got):
    leaf = Indexed(torch.zeros(1, 3, 4), torch.tensor(index))
    with pytest.raises(ConditionError) as caught:
        align(torch.zeros(1, 2, 4), leaf, where=lambda: "film at 'a'")
    assert str(caught.value) == (
        f"Signal.index chooses among 3 rows, 0 to 2; got {got} in film at 'a'"
    )


@pytest.mark.parametrize("rows", [(1, 3, 4), (2, 4), (3, 3, 4)])
def test_rows_of_another_batch_than_their_index_are_refused(rows):
    leaf = Indexed(torch.zeros(rows), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ShapeError) as caught:
        align(torch.zeros(2, 5, 4), leaf)
    assert str(caught.value) == (
        "an indexed modulation is rows (B, R, C) and an index (B, *positions); got "
        f"{rows} and (2, 5)"
    )


def test_a_constant_start_gives_each_share_its_value():
    layer = blank_linear(3, 6)
    reset_constant(layer, (0, 1, -1))
    assert torch.equal(
        layer(torch.randn(2, 3)), torch.tensor([[0.0, 0, 1, 1, -1, -1]]).repeat(2, 1)
    )
    bare = blank_linear(3, 6, bias=False)
    reset_constant(bare, (0, 0))
    assert not bare.weight.any()


def test_a_low_rank_generator_is_two_linears_without_bias():
    pair = low_rank(8, 2, 12)
    reset_linears(pair)
    assert [tuple(p.shape) for p in pair.parameters()] == [(2, 8), (12, 2)]
    jacobian = torch.autograd.functional.jacobian(pair, torch.randn(8))
    assert torch.linalg.matrix_rank(jacobian) == 2


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


def test_arithmetic_that_reached_an_index_is_refused():
    leaf = Indexed(torch.zeros(1, 3, 4), torch.tensor([[0.5, 1.0]]))
    with pytest.raises(ConditionError) as caught:
        align(torch.zeros(1, 2, 4), leaf)
    assert str(caught.value) == (
        "the index of rows is integer; got torch.float32; arithmetic on a modulation is for its "
        "rows alone"
    )


def test_a_sublayer_that_gives_no_tensor_is_told_what_to_give():
    x = torch.zeros(2, 5, 4)
    with pytest.raises(ShapeError) as caught:
        gated_residual(x, (x, None), torch.zeros(2, 4), where=lambda: "adaln_zero at 'a'")
    assert str(caught.value) == (
        "the sublayer gave a tuple in adaln_zero at 'a'; it gives back one tensor, as "
        "lambda h: attention(h, h, h)[0] does"
    )
