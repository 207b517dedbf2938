"""Both networks take whatever turns time and class into features, from an equal start."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from condmod.functional import Norm
from condmod_lab.config import TrainConfig, make_config
from condmod_lab.network import Network, build
from condmod_lab.places import own_draws

Tiny = Callable[..., TrainConfig]

CONV = {"channels": 8, "blocks": 2, "condition_dim": 8}
TRANSFORMER = {"name": "transformer", **CONV}
OWN_ENCODER = (
    "multi_condition(inner=dense_film, encoder=fuse(inputs={'time': timestep(dim=64, "
    "scale=1000.0), 'label': label(classes=10, nullable=True)}))"
)
SPECS = [
    "film",
    "film(scale='one_plus')",
    "dense_film",
    "dense_film(residual=True)",
    "ada_group_norm(groups=4)",
    "adaln_zero",
    "adaln_zero(parts=1)",
    "adaln_zero(init='identity')",
    "adaln_single",
    "add",
    "concat_project",
    "none",
    OWN_ENCODER,
]
SHAPE = (1, 8, 8)
CLASSES = 10

both = pytest.mark.parametrize("backbone", [CONV, TRANSFORMER], ids=["conv", "transformer"])
every = pytest.mark.parametrize("modulator", SPECS)


def make(tiny: Tiny, backbone: dict[str, Any], modulator: str = "film") -> Network:
    torch.manual_seed(3)
    return build(tiny(backbone=backbone, modulator=modulator), CLASSES, SHAPE)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = torch.arange(2 * CLASSES) % CLASSES
    present = torch.arange(2 * CLASSES) < CLASSES
    return torch.randn(2 * CLASSES, *SHAPE), torch.rand(2 * CLASSES), labels, present


def same(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def of_modulator(name: str) -> bool:
    return name.startswith("body.bank.")


@both
@every
def test_every_parameter_that_learns_gets_a_gradient_within_two_steps(
    tiny: Tiny, backbone: dict[str, Any], modulator: str
) -> None:
    net = make(tiny, backbone, modulator).train()
    inputs, target = batch(), torch.randn(2 * CLASSES, *SHAPE)
    learning = {name: value for name, value in net.named_parameters() if value.requires_grad}
    reached = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in learning.items()}
    optimizer = torch.optim.SGD(learning.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (net(*inputs) - target).square().mean().backward()
        for name, value in learning.items():
            assert value.grad is not None, name
            reached[name] |= value.grad != 0
        optimizer.step()
    for name, where in reached.items():
        rows = where.flatten(1).any(dim=1) if where.ndim > 1 else where
        assert rows.all() if of_modulator(name) else rows.any(), name


@both
@every
def test_an_encoder_is_frozen_where_nothing_reads_it_and_nowhere_else(
    tiny: Tiny, backbone: dict[str, Any], modulator: str
) -> None:
    net = make(tiny, backbone, modulator)
    frozen = {name for name, value in net.named_parameters() if not value.requires_grad}
    assert frozen == {
        name
        for name, _ in net.named_parameters()
        if modulator == "none" and name.startswith("encoder.")
    }
    assert (net.encoder is None) == (modulator == OWN_ENCODER)


@both
def test_under_one_seed_all_but_the_modulators_starts_equal(
    tiny: Tiny, backbone: dict[str, Any]
) -> None:
    base = make(tiny, backbone, "none").state_dict()
    drawn = torch.rand(3)
    for modulator in SPECS:
        shared = {
            name: value
            for name, value in make(tiny, backbone, modulator).state_dict().items()
            if not of_modulator(name)
        }
        assert torch.equal(torch.rand(3), drawn)
        missing = {name for name in base if name not in shared}
        assert all(".norm" in name or modulator == OWN_ENCODER for name in missing), modulator
        assert len(shared) > 8
        for name, value in shared.items():
            assert torch.equal(value, base[name]), (modulator, name)


@both
def test_each_place_and_each_seed_has_draws_of_its_own(
    tiny: Tiny, backbone: dict[str, Any]
) -> None:
    def generators(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        net = build(tiny(backbone=backbone, modulator="film"), CLASSES, SHAPE)
        return [p for name, p in net.named_parameters() if name.endswith("proj.weight")]

    first, again, other = generators(3), generators(3), generators(4)
    for index, weight in enumerate(first):
        assert torch.equal(weight, again[index])
        assert not torch.equal(weight, other[index])
        assert not any(torch.equal(weight, place) for place in first[:index])


@both
@pytest.mark.parametrize(
    "modulator", ["film", "dense_film", "adaln_zero(init='identity')", "adaln_single", OWN_ENCODER]
)
def test_a_place_draws_what_a_modulator_built_alone_draws_by_its_name(
    tiny: Tiny, backbone: dict[str, Any], modulator: str
) -> None:
    bank = make(tiny, backbone, modulator).body.bank
    torch.manual_seed(3)
    for name in bank:
        with own_draws(name):
            alone = bank.config.component(bank.config, bank[name].site)
        same(bank[name], alone)
    if bank.shared is not None:
        with own_draws("shared"):
            same(bank.shared, bank.config.component.shared(bank.config, [bank[name].site]))


@both
@pytest.mark.parametrize("modulator", ["film", "adaln_zero", "adaln_single", "cosmos", "cnaps"])
def test_a_forward_generates_once_for_all_places(
    tiny: Tiny, backbone: dict[str, Any], modulator: str
) -> None:
    net, calls = make(tiny, backbone, modulator), Counter[str]()
    for name, module in net.body.bank.named_modules():
        if not list(module.children()) and not isinstance(module, Norm):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    net.body.bank.register_forward_hook(lambda *_: calls.update(["bank"]))
    net(*batch())
    assert calls["bank"] == 1
    assert "shared" in {name.partition(".")[0] for name in calls} or net.body.bank.shared is None
    assert set(calls.values()) == {1}


@both
@pytest.mark.parametrize("modulator", ["dense_film", "adaln_zero(parts=1)", "adaln_single"])
def test_a_network_is_one_graph(tiny: Tiny, backbone: dict[str, Any], modulator: str) -> None:
    net, inputs = make(tiny, backbone, modulator), batch()
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*inputs), net(*inputs), atol=1e-6)


@both
def test_the_identity_of_every_modulator_around_a_sublayer_is_the_unconditioned_network(
    tiny: Tiny, backbone: dict[str, Any]
) -> None:
    inputs = batch()
    modulators = ["film(init='identity')", "dense_film(init='identity')"]
    if backbone is TRANSFORMER:  # the norms of the convolutional blocks have parameters
        modulators += ["adaln_zero(init='identity')", "adaln_zero(parts=1, init='identity')"]
    expected = make(tiny, backbone, "none")(*inputs)
    for modulator in modulators:
        assert torch.allclose(make(tiny, backbone, modulator)(*inputs), expected, atol=1e-6)


@both
@pytest.mark.parametrize("modulator", ["dense_film", OWN_ENCODER])
def test_class_time_and_presence_all_reach_the_velocity(
    tiny: Tiny, backbone: dict[str, Any], modulator: str
) -> None:
    net = make(tiny, backbone, modulator)
    x, t, labels, here = torch.randn(2, *SHAPE), torch.rand(2), torch.tensor([1, 2]), torch.ones(2)
    base = net(x, t, labels, here.bool())
    for other in (
        net(x, t / 2, labels, here.bool()),
        net(x, t, labels + 1, here.bool()),
        net(x, t, labels, ~here.bool()),
    ):
        assert not torch.allclose(base, other, atol=1e-6)
    assert torch.equal(net(x, t, labels, ~here.bool()), net(x, t, labels + 1, ~here.bool()))


@both
def test_an_unconditioned_network_ignores_time_and_class(
    tiny: Tiny, backbone: dict[str, Any]
) -> None:
    net = make(tiny, backbone, "none")
    x, t, labels, present = batch()
    assert torch.equal(net(x, t, labels, present), net(x, 1 - t, labels.flip(0), ~present))


@both
@every
def test_bfloat16_autocast_gives_about_the_same_velocity(
    tiny: Tiny, backbone: dict[str, Any], modulator: str
) -> None:
    net, inputs = make(tiny, backbone, modulator), batch()
    with torch.autocast("cpu", torch.bfloat16):
        velocity = net(*inputs)
    velocity.float().square().mean().backward()
    assert torch.allclose(velocity.float(), net(*inputs), atol=0.1)


@both
@pytest.mark.parametrize("modulator", ["dense_film", "adaln_zero", "adaln_single", OWN_ENCODER])
def test_a_network_on_the_meta_device_takes_the_tensors_of_a_real_one(
    tiny: Tiny, backbone: dict[str, Any], modulator: str
) -> None:
    net, inputs = make(tiny, backbone, modulator), batch()
    with torch.device("meta"):
        empty = Network(tiny(backbone=backbone, modulator=modulator), CLASSES, SHAPE)
    assert {name: value.shape for name, value in empty.state_dict().items()} == {
        name: value.shape for name, value in net.state_dict().items()
    }
    filled = empty.to_empty(device="cpu").eval()
    filled.load_state_dict(net.state_dict())
    assert torch.equal(filled(*inputs), net(*inputs))


@both
@pytest.mark.parametrize("modulator", ["dense_film", "adaln_zero", "adaln_single", OWN_ENCODER])
def test_copies_and_averages_compute_the_same(
    tiny: Tiny, backbone: dict[str, Any], modulator: str
) -> None:
    net, inputs = make(tiny, backbone, modulator), batch()
    assert torch.equal(deepcopy(net)(*inputs), net(*inputs))
    assert torch.equal(AveragedModel(net)(*inputs), net(*inputs))


@both
def test_images_may_have_colours_and_unequal_sides(tiny: Tiny, backbone: dict[str, Any]) -> None:
    net = build(tiny(backbone=backbone), 2, (3, 8, 4))
    x, labels = torch.randn(2, 3, 8, 4), torch.tensor([0, 1])
    assert net(x, torch.rand(2), labels, labels > 0).shape == x.shape


def test_the_default_networks_keep_their_number_of_parameters() -> None:
    def count(config: TrainConfig) -> int:
        return sum(value.numel() for value in build(config, CLASSES, SHAPE).parameters())

    assert count(TrainConfig()) == 100_769
    assert count(make_config({"backbone": {"name": "transformer"}})) == 208_708
