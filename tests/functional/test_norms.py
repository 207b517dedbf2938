"""The norms equal torch's own, with the channels at either end."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from condmod import ShapeError, SiteError
from condmod.functional import BatchNorm, featurewise_affine, normalisation

KINDS = ("layer", "rms", "group", "instance", "batch")
SHAPES = [(5, 6), (5, 6, 4), (5, 6, 2, 3), (5, 6, 2, 3, 2)]  # channels first
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (None, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
EPS = 1e-3


def theirs(kind, affine, rank):
    """Torch's module; without a bias where `affine` is weight."""
    both, some = affine == "both", affine != "none"
    if kind == "layer":
        return nn.LayerNorm(6, EPS, elementwise_affine=some, bias=both)
    if kind == "rms":
        return nn.RMSNorm(6, EPS, elementwise_affine=some)
    if kind == "group":
        return nn.GroupNorm(3, 6, EPS, affine=some)
    if kind == "instance":
        return INSTANCE_NORMS[rank - 2](6, EPS, affine=some)
    return BATCH_NORMS[rank - 2](6, EPS, affine=some, bias=both)


def pair(kind, affine, channel_dim, rank):
    """Ours and theirs with the same affine, away from 1 and 0."""
    torch.manual_seed(0)
    ours = normalisation(kind, 6, channel_dim, affine=affine, eps=EPS, groups=3)
    peer = theirs(kind, affine, rank)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.normal_()
            if getattr(peer, name, None) is not None:
                getattr(peer, name).copy_(parameter)
    return ours, peer


def call(peer, kind, x, channel_dim):
    """Torch's module reads layer and rms with channels last, the others with channels first."""
    here = -1 if kind in {"layer", "rms"} else 1
    return peer(x.movedim(channel_dim, here)).movedim(here, channel_dim)


def features(shape, channel_dim, dtype=torch.float32):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=dtype) * 2 + 1
    return x.movedim(1, channel_dim).contiguous().requires_grad_()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"rank{len(shape)}")
@pytest.mark.parametrize("channel_dim", [1, -1], ids=["first", "last"])
@pytest.mark.parametrize("affine", ["none", "weight", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_is_torchs(kind, affine, channel_dim, shape):
    if kind == "instance" and len(shape) == 2:
        pytest.skip("one position per channel: there is no statistic")
    ours, peer = (m.double() for m in pair(kind, affine, channel_dim, len(shape)))
    assert {*dict(ours.named_parameters())} == {
        "none": set(),
        "weight": {"weight"},
        "both": {"weight", "bias"},
    }[affine]
    x = features(shape, channel_dim, torch.float64)
    want = call(peer, kind, x, channel_dim)
    if kind == "rms" and affine == "both":  # torch's has no bias
        want = (want.movedim(channel_dim, -1) + ours.bias).movedim(-1, channel_dim)
    got = ours(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    goal = torch.randn_like(x)
    grads = [torch.autograd.grad((y * goal).sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=lambda shape: f"rank{len(shape)}")
@pytest.mark.parametrize("channel_dim", [1, -1], ids=["first", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_keeps_shape_dtype_and_layout(kind, channel_dim, shape):
    ours = normalisation(kind, 6, channel_dim, affine="both", groups=3)
    for dtype in (torch.float32, torch.bfloat16):
        x = features(shape, channel_dim, dtype)
        strided = features(shape, -channel_dim, dtype).movedim(-channel_dim, channel_dim)
        for given in (x, strided):
            y = ours(given)
            assert (y.shape, y.dtype) == (given.shape, dtype)
            assert y.is_contiguous() or not given.is_contiguous()


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("kind", ["layer", "rms", "group", "instance"])
def test_an_empty_batch_stays_empty(kind, channel_dim):
    x = torch.zeros(0, 6, 6)
    assert normalisation(kind, 6, channel_dim, groups=3)(x).shape == (0, 6, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_reset_parameters_sets_weight_to_one_and_all_else_to_the_start(kind):
    ours = normalisation(kind, 6, affine="both")
    fresh = copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        for value in ours.state_dict().values():
            value.fill_(7)
    ours.reset_parameters()
    assert torch.equal(ours.weight, torch.ones(6))
    assert torch.equal(ours.bias, torch.zeros(6))
    assert all(torch.equal(value, fresh[name]) for name, value in ours.state_dict().items())


# --- what does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "elements"),
    [("instance", (4, 6), 1), ("group", (4, 6), 1), ("batch", (1, 6), 1)],
)
def test_a_statistic_over_one_element_is_refused(kind, shape, elements):
    with pytest.raises(ShapeError) as caught:
        normalisation(kind, 6, groups=6)(torch.randn(shape))
    assert str(caught.value) == (
        f"{kind} norm averages over more than one element; features {shape} give it {elements}"
    )


def test_the_pass_says_where_a_statistic_is_over_one_element():
    norm = normalisation("batch", 6)
    with pytest.raises(ShapeError) as caught:
        featurewise_affine(
            torch.randn(1, 6), (torch.zeros(1, 6),) * 2, norm=norm, where=lambda: "film at 'a'"
        )
    assert str(caught.value) == (
        "batch norm averages over more than one element; features (1, 6) give it 1 in film at 'a'"
    )


def test_one_element_is_enough_to_evaluate_a_batch_norm():
    x = torch.randn(1, 6)
    torch.testing.assert_close(normalisation("batch", 6, eps=0.0).eval()(x), x)


@pytest.mark.parametrize("kind", KINDS)
def test_other_channels_are_refused(kind):
    with pytest.raises(ShapeError, match=re.escape("over 6 channels at dim 1; got (2, 5, 6)")):
        normalisation(kind, 6, 1)(torch.randn(2, 5, 6))


def test_groups_that_do_not_divide_the_features_are_refused():
    with pytest.raises(SiteError) as caught:
        normalisation("group", 6, groups=4, where="gn at 'a'")
    assert str(caught.value) == (
        "gn at 'a': groups=4 does not divide features=6; choose groups from [1, 2, 3, 6]"
    )


# --- batch norm -------------------------------------------------------------------------------


def trained(norm, xs, call):
    """Outputs of three training steps and of one evaluation; gradients of the steps."""
    outs, grads = [], []
    for x in xs:
        outs.append(call(norm, x))
        grads += torch.autograd.grad(outs[-1].square().sum() + outs[-1].sum(), x)
    norm.eval()
    return [*outs, call(norm, xs[0])], grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"rank{len(shape)}")
@pytest.mark.parametrize("channel_dim", [1, -1], ids=["first", "last"])
@pytest.mark.parametrize("affine", ["none", "weight", "both"])
def test_batch_norm_is_torchs_bit_for_bit(affine, channel_dim, shape, dtype):
    ours, peer = (m.to(dtype) for m in pair("batch", affine, channel_dim, len(shape)))
    xs = [features(shape, channel_dim, dtype).detach() + shift for shift in range(3)]
    xs = [x.requires_grad_() for x in xs]
    got, grads = trained(ours, xs, lambda norm, x: norm(x))
    want, their_grads = trained(peer, xs, lambda norm, x: call(norm, "batch", x, channel_dim))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(grads, their_grads)  # summed in the order of memory
    held, expected = ours.state_dict(), peer.state_dict()
    assert held.keys() == expected.keys()
    for name, value in held.items():
        assert torch.equal(value, expected[name]), name
    assert held["num_batches_tracked"] == 3


def test_batch_norm_and_torchs_load_each_others_state():
    ours, peer = normalisation("batch", 6, affine="both"), nn.BatchNorm1d(6)
    ours.load_state_dict(peer.state_dict(), strict=True)
    peer.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_passes_gradcheck(training, channel_dim):
    ours = normalisation("batch", 6, channel_dim, affine="both").double().train(training)
    x = features((3, 6, 2), channel_dim, torch.float64)
    assert torch.autograd.gradcheck(ours, x)


def test_statistics_in_bfloat16_are_updated_in_the_features_dtype():
    narrow, wide = normalisation("batch", 6).bfloat16(), normalisation("batch", 6)
    x = features((5, 6, 4), -1)
    assert torch.equal(narrow(x), wide(x))
    assert narrow.running_mean.dtype == torch.bfloat16
    assert torch.equal(narrow.running_mean, wide.running_mean.bfloat16())
    assert torch.equal(narrow.running_var, wide.running_var.bfloat16())


def test_statistics_in_float32_lose_nothing_to_bfloat16_features():
    ours, exact = normalisation("batch", 6, affine="both"), normalisation("batch", 6, affine="both")
    x = features((5, 6, 4), -1, torch.bfloat16)
    y, want = ours(x), exact(x.float())
    assert torch.equal(y, want.bfloat16())
    assert torch.equal(ours.running_var, exact.running_var)


def test_without_momentum_batch_norm_averages_all_batches_as_torch_does():
    ours, peer = normalisation("batch", 6, 1), nn.BatchNorm1d(6, affine=False)
    loader = [features((5, 6, 4), 1).detach() + shift for shift in range(4)]
    for norm in (ours, peer):
        norm(loader[0])  # what update_bn is to forget
        torch.optim.swa_utils.update_bn(loader, norm)
        assert norm.momentum == 0.1
    assert ours.running_mean.std() > 0
    assert torch.equal(ours.running_mean, peer.running_mean)
    assert torch.equal(ours.running_var, peer.running_var)


def test_a_momentum_of_zero_keeps_the_statistics():
    ours = normalisation("batch", 6, momentum=0.0)
    ours(torch.randn(5, 6) + 3)
    assert torch.equal(ours.running_mean, torch.zeros(6))
    assert torch.equal(ours.running_var, torch.ones(6))


def test_recomputed_features_enter_the_statistics_twice_as_in_torchs():
    ours, peer = normalisation("batch", 6), nn.BatchNorm1d(6, 1e-6, affine=False)
    x = torch.randn(5, 6, requires_grad=True)
    for norm in (ours, peer):
        checkpoint(norm, x, use_reentrant=False).square().sum().backward()
    assert ours.num_batches_tracked == peer.num_batches_tracked == 2
    assert torch.equal(ours.running_mean, peer.running_mean)


def test_a_compiled_batch_norm_updates_its_statistics():
    ours = normalisation("batch", 6, affine="both")
    eager = copy.deepcopy(ours)
    x = features((5, 6, 4), -1)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), eager(x))
    assert ours.num_batches_tracked == 2
    torch.testing.assert_close(ours.running_var, eager.running_var)


def test_sync_batch_norm_takes_over_a_batch_norm_with_its_state():
    ours = normalisation("batch", 6, 1, affine="both", momentum=0.3)
    ours(torch.randn(5, 6, 4))
    assert isinstance(ours, BatchNorm)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(ours))
    assert type(synced) is nn.SyncBatchNorm
    assert (synced.momentum, synced.eps) == (0.3, ours.eps)
    for name, value in synced.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    x = torch.randn(2, 6, 4)
    torch.testing.assert_close(synced.eval()(x), ours.eval()(x))


def test_one_channel_at_the_end_that_needs_no_gradient_is_normed():
    norm = normalisation("instance", 1, -1, affine="weight")
    norm(torch.randn(3, 2, 2, 3, 1)).sum().backward()
    assert norm.weight.grad.shape == (1,)
