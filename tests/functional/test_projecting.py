"""The linear step: in the layout that is faster, or by calling the layers; the same either way."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import condmod
from condmod.functional import projecting
from condmod.functional.projecting import project


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Linear]]:
    """Every layer that is called, in turn; where the faster layout stands in, there is none."""
    called: list[nn.Linear] = []
    inner = projecting._called

    def spy(c: Tensor, layer: nn.Linear) -> Tensor:
        called.append(layer)
        return inner(c, layer)

    monkeypatch.setattr(projecting, "_called", spy)
    monkeypatch.setattr(projecting, "_MEASURED", True)
    return called


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the faster layout for small weights, too."""
    monkeypatch.setattr(projecting, "_LARGE", 0)


def test_who_has_changed_what_every_linear_does_is_heard(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, c: c.new_full((2, 5), 7.0))
    (got,) = project(torch.zeros(2, 3), [nn.Linear(3, 5)])
    assert torch.equal(got, torch.full((2, 5), 7.0))


def layers_of(*widths: tuple[int, int], **options: Any) -> list[nn.Linear]:
    return [nn.Linear(before, after, **options) for before, after in widths]


SIZES = [
    (1, 512, 4096, 2, True),
    (4, 512, 4096, 2, True),
    (8, 512, 4096, 2, True),
    (9, 512, 4096, 2, False),
    (4, 513, 4096, 2, True),
    (5, 513, 4096, 2, False),
    (1, 512, 8192, 1, True),
    (1, 512, 8191, 1, False),
    (0, 512, 8192, 1, False),
]


@torch.no_grad()
@pytest.mark.parametrize(("batch", "width", "out", "count", "transposed"), SIZES)
def test_few_rows_and_large_weights_are_read_by_weight(
    batch: int, width: int, out: int, count: int, transposed: bool, calls: list[nn.Linear]
):
    layers, c = layers_of(*[(width, out)] * count), torch.randn(batch, width)
    found = project(c, layers)
    assert calls == ([] if transposed else layers)
    for layer, own in zip(layers, found, strict=True):
        wanted = F.linear(c.double(), layer.weight.double(), layer.bias.double())
        assert own.shape == (batch, out)
        assert own.is_contiguous()
        torch.testing.assert_close(own.double(), wanted, rtol=1e-6, atol=5e-6)


@torch.no_grad()
@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", range(1, 9))
def test_both_layouts_agree_to_rounding_for_layers_of_several_sizes(
    batch: int, bias: bool, calls: list[nn.Linear]
):
    layers, c = layers_of((24, 5), (24, 1), (24, 130), bias=bias), torch.randn(batch, 24)
    found, again = project(c, layers), project(c, layers)
    assert calls == []
    for layer, own, other in zip(layers, found, again, strict=True):
        assert torch.equal(own, other)
        torch.testing.assert_close(own, F.linear(c, layer.weight, layer.bias), rtol=2e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.usefixtures("any_size")
def test_equal_rows_give_equal_results(calls: list[nn.Linear]):
    (layer,), row = layers_of((300, 77)), torch.randn(1, 300)
    alone = project(row, [layer])[0]
    for batch in (2, 3, 5, 8):
        for own in project(row.expand(batch, -1), [layer])[0]:
            torch.testing.assert_close(own, alone[0], rtol=2e-6, atol=1e-6)
    assert calls == []


class Own(nn.Linear):
    """A Linear of a library's own, as LoRA and quantised layers are."""


def parametrized(layer: nn.Linear) -> None:
    parametrize.register_parametrization(layer, "weight", nn.Tanh())


def offloaded(layer: nn.Linear) -> None:
    own = layer.forward
    layer.forward = lambda c: own(c) + 1


CHANGED: dict[str, Callable[[nn.Linear], object]] = {
    "parametrized": parametrized,
    "with a forward of its own": offloaded,
    "with a hook": lambda layer: layer.register_forward_hook(lambda *_: torch.ones(2, 5)),
    "with a hook in front": lambda layer: layer.register_forward_pre_hook(lambda _, c: c[0] + 1),
    "with a hook that makes its weight": lambda layer: prune.l1_unstructured(layer, "weight", 9),
    "in float64": lambda layer: layer.double(),
}


@torch.no_grad()
@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_layer_that_is_more_than_a_plain_linear_is_called(change: Callable[[nn.Linear], object]):
    layer = nn.Linear(6, 5).eval()
    change(layer)
    c = torch.randn(2, 6, dtype=next(layer.parameters()).dtype)
    assert torch.equal(project(c, [layer])[0], layer(c))


@torch.no_grad()
@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("odd", [Own(6, 5), nn.Sequential(nn.Linear(6, 5)), torch.sin])
def test_beside_a_layer_of_another_class_all_layers_are_called(odd: Any, calls: list[nn.Linear]):
    plain = nn.Linear(6, 5)
    c = torch.randn(2, 6)
    assert torch.equal(project(c, [plain, odd])[1], odd(c))
    assert plain in calls


@torch.no_grad()
@pytest.mark.usefixtures("any_size")
def test_a_layer_whose_weight_is_a_tensor_of_another_class_is_called(calls: list[nn.Linear]):
    class Quantised(Tensor):
        """A weight as a library keeps it."""

    layer = nn.Linear(6, 5)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    project(torch.randn(2, 6), [layer])
    assert calls == [layer]


@torch.no_grad()
@pytest.mark.usefixtures("any_size")
def test_a_hook_on_every_module_sees_the_call(calls: list[nn.Linear]):
    layer, seen = nn.Linear(6, 5), []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        project(torch.randn(2, 6), [layer])
    finally:
        handle.remove()
    assert seen == [1]
    assert calls == [layer]


@torch.no_grad()
@pytest.mark.usefixtures("any_size")
def test_under_functional_call_the_given_weights_are_read():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(6, 5)

        def forward(self, c: Tensor) -> Tensor:
            return project(c, [self.proj])[0]

    holder, c = Holder(), torch.randn(2, 6)
    other = {name: torch.zeros_like(value) for name, value in holder.state_dict().items()}
    assert not torch.func.functional_call(holder, other, c).any()


class Named(Tensor):
    """A tensor as a library keeps it."""


PLACES: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Tensor]] = {
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), torch.randn(2, 6)),
    "float64 rows": (nullcontext, torch.randn(2, 6, dtype=torch.float64)),
    "bfloat16 rows": (nullcontext, torch.randn(2, 6, dtype=torch.bfloat16)),
    "rows of another class": (nullcontext, torch.randn(2, 6).as_subclass(Named)),
    "aligned rows": (nullcontext, torch.randn(2, 3, 6)),
    "one vector": (nullcontext, torch.randn(6)),
}


@torch.no_grad()
@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(("place", "c"), PLACES.values(), ids=PLACES)
def test_what_was_not_measured_is_given_to_the_layers(
    place: Callable[[], AbstractContextManager[Any]], c: Tensor, calls: list[nn.Linear]
):
    layer = nn.Linear(6, 5)
    layer = layer if place is not nullcontext else layer.to(c.dtype)
    with place():
        found = project(c, [layer])[0]
        assert found.dtype == layer(c).dtype
    assert calls == [layer]


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("wants", ["weight", "rows"])
def test_where_a_gradient_is_recorded_the_layers_are_called(wants: str, calls: list[nn.Linear]):
    layer, c = nn.Linear(6, 5).requires_grad_(wants == "weight"), torch.randn(2, 6)
    c.requires_grad_(wants == "rows")
    project(c, [layer])[0].sum().backward()
    assert calls == [layer]
    assert (layer.weight if wants == "weight" else c).grad is not None
    frozen = layer.requires_grad_(False)
    project(c.detach(), [frozen])
    assert calls == [layer]


@torch.no_grad()
@pytest.mark.usefixtures("any_size")
def test_compiled_it_is_one_graph_of_plain_linears_for_batches_of_any_size():
    layers = layers_of((6, 5), (6, 7))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda c: project(c, layers), fullgraph=True, dynamic=True, backend=keep
    )
    for batch in (2, 5, 8, 40):
        c = torch.randn(batch, 6)
        for own, layer in zip(compiled(c), layers, strict=True):
            torch.testing.assert_close(own, layer(c))
    assert len(graphs) == 1


@torch.no_grad()
@pytest.mark.usefixtures("any_size")
def test_a_traced_projection_serves_another_batch():
    layer = nn.Linear(6, 5).requires_grad_(False)
    with pytest.warns(DeprecationWarning, match="jit"):
        traced = torch.jit.trace(lambda c: project(c, [layer])[0], torch.randn(1, 6))
    c = torch.randn(3, 6)
    torch.testing.assert_close(traced(c), layer(c))


@torch.no_grad()
@pytest.mark.usefixtures("any_size")
def test_a_linear_generator_reads_its_projection_so(calls: list[nn.Linear]):
    film, c = condmod.create("film", features=4, condition_dim=6), torch.randn(2, 6)
    found = film.generate(c)
    assert calls == []
    torch.testing.assert_close(torch.cat(list(found), -1), film.proj(c))
