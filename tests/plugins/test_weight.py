"""What the modulators of weights promise beside the laws."""

import copy
import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.ao.nn.quantized import Linear as QuantisedLinear
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from condmod import ShapeError, SiteError, SpecError, attach, configure, create
from condmod_weight.stylegan2 import Style, StyleGAN2

CONV = {"features": 6, "condition_dim": 4, "channel_dim": 1, "name": "up.conv"}


def stylegan2(spec="stylegan2", **place):
    return create(spec, **{**CONV, **place})


def test_stylegan2_starts_with_styles_around_one():
    ours = create("stylegan2", features=256, condition_dim=400)
    assert torch.equal(ours.proj.bias, torch.ones(256))
    assert abs(ours.proj.weight.std().item() * 400**0.5 - 1) < 0.02
    assert not create("stylegan2(init='identity')", features=8, condition_dim=4).proj.weight.any()


def test_stylegan2_gives_every_output_channel_the_length_one():
    layer = nn.ConvTranspose2d(6, 8, 3, groups=2, bias=False)
    ours = stylegan2(out_features=8).double()
    impulse, c = torch.eye(6).double()[:, :, None, None], torch.randn(1, 4).double()
    taps = ours(impulse, c.expand(6, -1), layer.double())  # a row for each channel that it reads
    torch.testing.assert_close(taps.square().sum((0, 2, 3)), torch.ones(8).double())


def test_stylegan2_adds_the_bias_of_the_layer_after_the_demodulation():
    layer = nn.Conv1d(6, 6, 3).double()
    bare = copy.deepcopy(layer)
    bare.bias = None
    ours = stylegan2().double()
    x, c = torch.randn(2, 6, 7).double(), torch.randn(2, 4).double()
    torch.testing.assert_close(ours(x, c, layer), ours(x, c, bare) + layer.bias[:, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 3e4])
def test_stylegan2_is_exact_in_half_precision_for_small_and_large_styles(dtype, size):
    torch.manual_seed(0)
    ours, layer = stylegan2(features=64), nn.Conv1d(64, 64, 3, padding=1)
    x, style = torch.randn(4, 64, 32), size * (1 + 0.3 * torch.randn(4, 64))

    def run(dtype):
        held = copy.deepcopy(ours).to(dtype), copy.deepcopy(layer).to(dtype)
        return held[0].around(x.to(dtype), (Style(style.to(dtype)),), held[1]).double()

    want = run(torch.float64)
    assert (run(dtype) - want).norm() < 8 * torch.finfo(dtype).eps * want.norm()


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // 4)
        return out


def test_stylegan2_makes_no_weight_for_each_sample():
    batch, layer = 64, nn.Conv1d(32, 32, 9, padding=4)
    x, c = torch.randn(batch, 32, 4), torch.randn(batch, 4)
    with Largest() as largest:
        stylegan2(features=32)(x, c, layer)
    assert largest.elements <= max(x.numel(), layer.weight.numel())


def test_stylegan2_demodulates_in_float32_under_autocast():
    ours, layer = stylegan2(features=64), nn.Conv1d(64, 64, 3)
    (style,) = ours.generate(torch.randn(2, 4))
    y = torch.randn(2, 64, 5)
    want = ours.exit(y, y, style, layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.exit(y, y, style, layer), want)


def test_stylegan2_attached_is_what_it_is_by_hand():
    net = nn.Sequential(nn.Conv1d(6, 8, 3), nn.SiLU(), nn.ConvTranspose1d(8, 6, 3, groups=2))
    base = copy.deepcopy(net)
    spec = {"0": "stylegan2", "2": "stylegan2"}
    attached = attach(net, spec, condition_dim=4, start="published")
    x, c = torch.randn(2, 6, 7), torch.randn(2, 4)
    first, second = (m for m in attached.bank.modules() if isinstance(m, StyleGAN2))
    want = second(base[1](first(x, c, base[0])), c, base[2])
    assert torch.equal(attached(x, condition=c), want)


def test_stylegan2_as_the_base_is_the_layer_bit_for_bit():
    options = StyleGAN2.as_base(StyleGAN2.Config())
    ours = stylegan2({"name": "stylegan2", **options}, out_features=8)
    layer, x = nn.Conv2d(6, 8, 3), torch.randn(2, 6, 5, 5)
    assert torch.equal(ours(x, torch.randn(2, 4), layer), layer(x))


def test_stylegan2_reads_a_weight_that_a_parametrization_makes():
    layer = parametrizations.weight_norm(nn.Conv1d(6, 8, 3, bias=False)).double()
    plain = nn.Conv1d(6, 8, 3, bias=False).double()
    plain.weight.data.copy_(layer.weight)
    ours = stylegan2(out_features=8).double()
    x, c = torch.randn(2, 6, 7).double(), torch.randn(2, 4).double()
    torch.testing.assert_close(ours(x, c, layer), ours(x, c, plain))


class OtherForward(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight.sign(), self.bias)


def quantised():
    with warnings.catch_warnings():  # torch deprecates its own layers, and says so once
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor")
        return QuantisedLinear(6, 6)


def with_integers():
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    return layer


REFUSED = {
    "a function": (
        lambda: torch.sin,
        "it reads the weight of an nn.Linear, an nn.Conv1d to 3d or an nn.ConvTranspose1d to 3d; "
        "got a builtin_function_or_method",
    ),
    "a quantised layer": (
        quantised,
        "it reads the weight of an nn.Linear, an nn.Conv1d to 3d or an nn.ConvTranspose1d to 3d; "
        "got a Linear of torch.ao.nn.quantized.modules.linear",
    ),
    "a weight of integers": (
        with_integers,
        "it reads a weight that is a plain floating tensor; got torch.int8 in a Parameter, as "
        "quantised or sharded layers have",
    ),
    "another forward": (
        lambda: OtherForward(6, 6, 3),
        "a OtherForward has a forward of its own, which may use its weight in another way than "
        "nn.Conv2d does",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_stylegan2_refuses_what_it_cannot_read(what):
    make, reason = REFUSED[what]
    layer = make()
    assert StyleGAN2.refuses_layer(layer) == reason
    ours = stylegan2()
    said = f"stylegan2 at 'up.conv' cannot act around this sublayer: {reason}"
    for run in (
        lambda: ours(torch.randn(2, 6, 5, 5), torch.randn(2, 4), layer),
        lambda: ours.exit(None, torch.randn(2, 6), ours.generate(torch.randn(2, 4))[0], layer),
    ):
        with pytest.raises(SiteError, match=f"^{re.escape(said)}$"):
            run()


@pytest.mark.parametrize(
    "make",
    [partial(nn.Linear, 6, 8), partial(nn.Conv3d, 6, 8, 3), partial(nn.ConvTranspose1d, 6, 8, 3)],
)
def test_stylegan2_takes_torch_s_own_layers(make):
    assert StyleGAN2.refuses_layer(make()) == ""


@pytest.mark.parametrize(
    ("layer", "printed"),
    [
        (nn.Conv2d(6, 8, 3), "Conv2d(6, 8, kernel_size=(3, 3), stride=(1, 1))"),
        (nn.Linear(6, 6), "Linear(in_features=6, out_features=6, bias=True)"),
    ],
)
def test_stylegan2_refuses_a_layer_of_other_sizes(layer, printed):
    said = (
        "stylegan2 at 'up.conv' is for a layer from 6 to 6 features with channels at dim 1; "
        f"got {printed}"
    )
    with pytest.raises(ShapeError, match=f"^{re.escape(said)}$"):
        stylegan2()(torch.randn(2, 6, 5, 5), torch.randn(2, 4), layer)


def test_stylegan2_refuses_a_batch_that_a_convolution_would_take_for_channels():
    layer = nn.Conv2d(6, 6, 1, bias=False)
    said = (
        f"stylegan2 at 'up.conv' is around {layer}, which takes features of rank 4; got (6, 6, 5)"
    )
    with pytest.raises(ShapeError, match=f"^{re.escape(said)}$"):
        stylegan2()(torch.randn(6, 6, 5), torch.randn(6, 4), layer)


def test_stylegan2_has_no_style_for_each_position():
    with pytest.raises(ShapeError, match=r"takes a global condition \(B, condition_dim=4\) for"):
        stylegan2()(torch.randn(2, 6, 5), torch.randn(2, 4, 5), nn.Conv1d(6, 6, 1))


@pytest.mark.parametrize("spec", ["conditional_low_rank(rank=3)", "hypernetwork(rank=3)"])
def test_a_path_of_low_rank_starts_as_the_layer_bit_for_bit(spec):
    for layer, x in (
        (nn.Linear(6, 8), torch.randn(2, 5, 6)),
        (nn.Conv2d(6, 8, 1), torch.randn(2, 6, 4, 3)),
    ):
        dim = -1 if isinstance(layer, nn.Linear) else 1
        ours = create(spec, features=6, condition_dim=4, channel_dim=dim, out_features=8)
        assert torch.equal(ours(x, torch.randn(2, 4), layer), layer(x))


@pytest.mark.parametrize("spec", ["conditional_low_rank(rank=3)", "hypernetwork(rank=3)"])
def test_a_path_of_low_rank_refuses_a_layer_that_moves_or_widens_positions(spec):
    ours = create(spec, **CONV, out_features=8)
    x, c = torch.randn(2, 6, 5, 5), torch.randn(2, 4)
    said = (
        f"{ours.name} at 'up.conv' adds (2, 8, 5, 5) to what its sublayer makes of features "
        "(2, 6, 5, 5); the sublayer gave {}: it acts at each position, and Site.out_features says "
        "how many features it gives"
    )
    for layer, got in {
        nn.Conv2d(6, 8, 3): "(2, 8, 3, 3)",
        nn.Conv2d(6, 6, 1): "(2, 6, 5, 5)",
        (lambda h: (h, None)): "a tuple",
    }.items():
        with pytest.raises(ShapeError, match=f"^{re.escape(said.format(got))}$"):
            ours(x, c, layer)


def test_conditional_low_rank_starts_its_ranks_around_the_weight_of_lora():
    ours = create("conditional_low_rank(rank=300)", features=200, condition_dim=100)
    assert torch.equal(ours.proj.bias, torch.ones(300))
    for layer, reads in ((ours.proj, 100), (ours.down, 200)):
        bound = reads**-0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound
    assert not ours.up.weight.any()


def test_conditional_low_rank_is_lora_where_every_weight_is_one():
    ours = create("conditional_low_rank(rank=3, alpha=6.0)", features=6, condition_dim=4).double()
    for layer in (ours.proj, ours.up):
        nn.init.normal_(layer.weight)
    layer, x = nn.Linear(6, 6).double(), torch.randn(2, 5, 6).double()
    merged = copy.deepcopy(layer)
    merged.weight.data += 2 * ours.up.weight @ ours.down.weight
    torch.testing.assert_close(ours(x, torch.zeros(2, 4).double(), layer), merged(x))


def test_hypernetwork_starts_with_the_factors_of_lora_for_every_condition():
    ours = create("hypernetwork(rank=300, hidden=[5])", features=200, condition_dim=4)
    (update,) = ours.generate(torch.randn(2, 4))
    assert update.down.shape == (2, 300, 200)
    assert not update.up.any()
    assert torch.equal(update.down[0], update.down[1])
    bound = 200**-0.5
    assert 0.99 * bound < update.down.abs().max() <= bound
    assert abs(update.down.std().item() - bound / 3**0.5) < 1e-3


def test_hypernetwork_gives_each_sample_a_weight_of_its_own():
    ours = create("hypernetwork(rank=3, alpha=6.0)", features=6, condition_dim=4, out_features=8)
    ours = ours.double()
    nn.init.normal_(ours.proj.weight)
    layer, x, c = (
        nn.Linear(6, 8).double(),
        torch.randn(2, 5, 6).double(),
        torch.randn(2, 4).double(),
    )
    (update,) = ours.generate(c)
    for sample in range(2):
        merged = copy.deepcopy(layer)
        merged.weight.data += 2 * update.up[sample].T @ update.down[sample]
        torch.testing.assert_close(ours(x, c, layer)[sample], merged(x[sample]))


def test_hypernetwork_makes_no_whole_weight_for_a_sample():
    ours = create("hypernetwork(rank=2)", features=64, condition_dim=4)
    x, c = torch.randn(8, 3, 64), torch.randn(8, 4)
    with Largest() as largest:
        ours.around(x, ours.generate(c), torch.sin)
    assert largest.elements < 64 * 64


def test_hypernetwork_names_the_batch_that_it_generated_for():
    ours = create("hypernetwork", **CONV)
    modulation = ours.generate(torch.randn(3, 4))
    said = "hypernetwork at 'up.conv' generated updates for a batch of 3; got features (2, 6, 5)"
    with pytest.raises(ShapeError, match=f"^{re.escape(said)}$"):
        ours.around(torch.randn(2, 6, 5), modulation, torch.sin)


def test_conditional_conv_is_drawn_as_torch_draws_convolution_and_linear():
    ours = create("conditional_conv(experts=3)", features=32, condition_dim=100)
    assert ours.weight.shape == (3, 32, 32, 3, 3)
    for value, reads in ((ours.weight, 32 * 9), (ours.proj.weight, 100)):
        bound = reads**-0.5
        assert 0.9 * bound < value.abs().max() <= bound


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_conditional_conv_starts_as_the_identity_and_its_experts_part(spatial_dims):
    torch.manual_seed(0)
    spec = f"conditional_conv(init='identity', spatial_dims={spatial_dims})"
    ours = create(spec, features=6, condition_dim=4, channel_dim=1)
    x, c = torch.randn(4, 6, *[3] * spatial_dims), torch.randn(4, 4)
    y = ours(x, c)
    assert torch.equal(y, x)
    (y * torch.randn_like(y)).sum().backward()
    pairs = ours.weight.grad.flatten(1)
    for first in range(4):
        for second in range(first):
            assert not torch.allclose(pairs[first], pairs[second])


def test_conditional_conv_in_half_precision_is_as_exact_as_a_convolution():
    torch.manual_seed(0)
    ours = create("conditional_conv", features=32, condition_dim=4, channel_dim=1)
    x, c = torch.randn(4, 32, 8, 8), torch.randn(4, 4)
    want = copy.deepcopy(ours).double()(x.double(), c.double())
    low = copy.deepcopy(ours).bfloat16()(x.bfloat16(), c.bfloat16())
    assert low.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ours(x, c)
    assert mixed.dtype == x.dtype
    for got in (low, mixed):
        assert (got - want).norm() < 2**-7 * want.norm()


def test_conditional_conv_refuses_features_with_other_sides_or_another_batch():
    ours = create("conditional_conv(experts=5)", **CONV)
    said = (
        "conditional_conv at 'up.conv' takes features with 2 sides (option spatial_dims) and the "
        "batch of its routing (3, 5); got {}"
    )
    modulation = ours.generate(torch.randn(3, 4))
    for shape in ((3, 6, 7), (2, 6, 7, 7)):
        with pytest.raises(ShapeError, match=f"^{re.escape(said.format(shape))}$"):
            ours.modulate(torch.randn(shape), modulation)


def test_conditional_conv_refuses_a_kernel_without_a_centre():
    said = "conditional_conv: kernel=4 has no centre; choose an odd one"
    with pytest.raises(SpecError, match=f"^{re.escape(said)}"):
        configure("conditional_conv(kernel=4)")


AROUND = {
    "stylegan2": nn.Conv1d(6, 6, 3),
    "conditional_low_rank": nn.Conv1d(6, 6, 1),
    "hypernetwork": nn.Conv1d(6, 6, 1),
    "conditional_conv(spatial_dims=1)": None,
}


class Placed(nn.Module):
    """A modulator around its layer, or alone."""

    def __init__(self, spec):
        super().__init__()
        self.modulator, self.layer = create(spec, **CONV), AROUND[spec]

    def forward(self, x, c):
        return self.modulator(x, c, *([] if self.layer is None else [self.layer]))


@pytest.mark.parametrize("spec", AROUND)
def test_what_modulates_weights_is_exported_for_every_batch(spec):
    placed, batch = Placed(spec), torch.export.Dim("batch")
    inputs = torch.randn(3, 6, 5), torch.randn(3, 4)
    shapes = {"x": {0: batch}, "c": {0: batch}}
    program = torch.export.export(placed, inputs, dynamic_shapes=shapes).module()
    for size in (2, 5):
        x, c = torch.randn(size, 6, 5), torch.randn(size, 4)
        torch.testing.assert_close(program(x, c), placed(x, c))


@pytest.mark.parametrize("spec", [spec for spec in AROUND if AROUND[spec]])
def test_what_modulates_a_layer_takes_an_empty_batch(spec):
    x = torch.randn(0, 6, 5)
    assert Placed(spec)(x, torch.randn(0, 4)).shape == AROUND[spec](x).shape


@pytest.mark.parametrize("spec", AROUND)
def test_what_modulates_weights_tells_its_output_s_shape_on_meta(spec):
    x, c = torch.randn(2, 6, 5), torch.randn(2, 4)
    placed = Placed(spec)
    meta = copy.deepcopy(placed).to("meta")
    assert meta(x.to("meta"), c.to("meta")).shape == placed(x, c).shape


@pytest.mark.parametrize("spec", AROUND)
def test_a_modulator_in_float32_serves_a_half_precision_model(spec):
    placed = Placed(spec)
    for parameter in placed.modulator.parameters():
        nn.init.normal_(parameter)
    x, c = torch.randn(2, 6, 5), torch.randn(2, 4)
    want = placed(x, c)
    half = copy.deepcopy(placed)
    if half.layer is not None:
        half.layer.bfloat16()
    got = half(x.bfloat16(), c)
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() < 2**-5 * want.norm()


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 4, 3), nn.ConvTranspose2d(6, 4, 3, 2)])
def test_penalties_of_gradients_go_through_stylegan2(layer):
    ours, layer = stylegan2(out_features=4).double(), layer.double()
    inputs = torch.randn(2, 6, 3, 4).double(), torch.randn(2, 4).double()
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    assert torch.autograd.gradgradcheck(lambda x, c: ours(x, c, layer), inputs)
