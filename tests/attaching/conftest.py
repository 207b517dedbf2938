"""What tests on real models share: timm without torchvision, what hosts promise, known classes."""

import copy
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

import condmod
from condmod.errors import SiteError

# A model, the patterns to attach by, and how to run it: run(model, **what a conditioned one takes).
Host = tuple[nn.Module, Mapping[str, Any], Callable[..., Tensor]]
Law = Callable[[Host], None]


class Call(NamedTuple):
    """One call of a module in a model's run."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@pytest.fixture(scope="session")
def timm() -> types.ModuleType:
    """The package; torchvision, which fails beside a CPU build of torch, is stood in for."""
    names = ("", ".ops", ".ops.misc", ".models", ".models.feature_extraction", ".datasets")
    names = (*names, ".transforms", ".transforms.functional")
    stand_ins = {f"torchvision{name}": MagicMock(__spec__=None) for name in names}
    stand_ins["torchvision.ops.misc"].FrozenBatchNorm2d = type("Frozen", (nn.Module,), {})
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setitem(sys.modules, name, stand_in)
        import timm

        return timm


def starts_as_the_base(host: Host) -> None:
    model, patterns, run = host
    for training in (False, True):
        _still(model.train(training))
        expected = _seeded(run, model)
        conditioned = condmod.attach(model, patterns, condition_dim=5)
        got = _seeded(run, conditioned.train(training), condition=torch.randn(2, 5))
        assert torch.equal(got, expected), f"training={training}"
        conditioned.detach()


def changes_under_a_condition(host: Host) -> None:
    model, patterns, run = host
    model.eval()
    conditioned = drawn(model, patterns)
    one, other = torch.randn(2, 2, 5)
    with torch.no_grad(), conditioned.disabled():
        base = run(model)
    with torch.no_grad():
        outputs = [run(conditioned, condition=c) for c in (one, other)]
        with conditioned.condition(one):
            assert torch.equal(run(model), outputs[0])
    assert not torch.allclose(outputs[0], base, atol=1e-3)
    assert not torch.allclose(outputs[1], base, atol=1e-3)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def is_the_base_at_strength_0(host: Host) -> None:
    model, patterns, run = host
    expected = _seeded(run, model.eval())
    conditioned = drawn(model, patterns)
    got = _seeded(run, conditioned, condition=torch.randn(2, 5), strength=0.0)
    assert torch.equal(got, expected)


def trains_the_bank_alone(host: Host) -> None:
    model, patterns, run = host
    before = {name: tensor.clone() for name, tensor in model.eval().state_dict().items()}
    conditioned = condmod.attach(model, patterns, condition_dim=5).train()
    start = {name: tensor.clone() for name, tensor in conditioned.bank.state_dict().items()}
    optimiser = torch.optim.AdamW(conditioned.parameters(), lr=1e-2)
    condition = torch.randn(2, 5)
    for _ in range(2):
        optimiser.zero_grad()
        run(conditioned, condition=condition).square().mean().backward()
        optimiser.step()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == []
    own = dict(conditioned.bank.named_parameters())
    assert own
    assert [name for name, p in own.items() if p.grad is None or not p.grad.any()] == []
    assert [name for name, p in own.items() if torch.equal(p, start[name])] == []
    after = model.state_dict()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []


def keeps_the_keys(host: Host) -> None:
    model, patterns, _ = host
    before = list(model.state_dict())
    conditioned = condmod.attach(model, patterns, condition_dim=5)
    assert list(model.state_dict()) == before
    assert [name for name in conditioned.state_dict() if not name.startswith("bank.")] == [
        f"base.{name}" for name in before
    ]


def comes_off_without_a_trace(host: Host) -> None:
    model, patterns, run = host
    expected = _seeded(run, model.eval())
    classes = [type(module) for module in model.modules()]
    held = [set(vars(module)) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    conditioned = drawn(model, patterns)
    run(conditioned, condition=torch.randn(2, 5)).sum().backward()
    assert conditioned.detach() is model
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == held
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert torch.equal(_seeded(run, model), expected)


def comes_back_from_a_folder(host: Host) -> None:
    model, patterns, run = host
    other = copy.deepcopy(model.eval())
    conditioned = drawn(model, patterns)
    condition = torch.randn(2, 5)
    with TemporaryDirectory() as folder:
        conditioned.save_pretrained(folder)
        loaded = condmod.load_pretrained(other, folder)
    expected = _seeded(run, conditioned, condition=condition)
    assert torch.equal(_seeded(run, loaded, condition=condition), expected)


LAWS: tuple[Law, ...] = (
    starts_as_the_base,
    changes_under_a_condition,
    is_the_base_at_strength_0,
    trains_the_bank_alone,
    keeps_the_keys,
    comes_off_without_a_trace,
    comes_back_from_a_folder,
)


@pytest.fixture(params=LAWS, ids=lambda law: law.__name__)
def law(request: pytest.FixtureRequest) -> Law:
    """What every host is promised, law by law; each asserts one of a fresh host."""
    asserts: Law = request.param
    return asserts


def drawn(model: nn.Module, patterns: Mapping[str, Any], **options: Any) -> condmod.Conditioned:
    """An attached model whose modulators are no longer the identity."""
    conditioned = condmod.attach(model, patterns, **{"condition_dim": 5, **options})
    for parameter in conditioned.bank.parameters():
        nn.init.normal_(parameter, std=0.5)
    return conditioned


@pytest.fixture(name="drawn")
def _drawn() -> Callable[..., condmod.Conditioned]:
    return drawn


def _still(model: nn.Module) -> None:
    """Batch norms keep their statistics, as those of a frozen base do."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()


def _seeded(run: Callable[..., Tensor], model: nn.Module, **options: Any) -> Tensor:
    """The output from one state of the generator, which dropout draws from."""
    torch.manual_seed(1)
    with torch.no_grad():
        return run(model, **options)


@pytest.fixture(scope="session")
def record() -> Callable[..., dict[str, list[Call]]]:
    """Runs models and notes the calls of modules of known classes, by the path of the class."""

    def notes(
        models: Iterable[tuple[nn.Module, Callable[[Any], Any]]], known: Mapping[str, Any]
    ) -> dict[str, list[Call]]:
        seen: dict[str, dict[str, Call]] = {path: {} for path in known}

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            shapes = torch.utils._pytree.tree_map(_shape, (args, output))
            seen[_path(module)].setdefault(str(shapes), Call(module, args, kwargs, output))

        for model, run in models:
            for module in model.modules():
                if _path(module) in known:
                    module.register_forward_hook(note, with_kwargs=True)
            with torch.no_grad():
                run(model.eval())
        return {path: list(calls.values()) for path, calls in seen.items()}

    return notes


def _shape(leaf: Any) -> Any:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf)


@pytest.fixture(scope="session")
def agree() -> Callable[[list[Call]], None]:
    """Asserts that calls of a class read and gave, on a batch of 2, what attach knows of it."""

    def asserts(calls: list[Call]) -> None:
        assert calls, "no model of this test calls the class"
        for call in calls:
            x, y = _planned(call, "input"), _planned(call, "output")
            if x is None and y is None:  # refused altogether: its batch is not the samples
                assert call.args[0].shape[0] != 2
            if x is None or y is None:
                continue
            assert x.ndim == y.ndim
            if isinstance(call.output, tuple):
                streams = [one for one in call.output if isinstance(one, Tensor) and one.ndim > 2]
                assert len(streams) < 2 or x.shape == y.shape, "another item has the features"

    return asserts


def _planned(call: Call, placement: str) -> Tensor | None:
    """The features at one end of a call, which are as planned; None where that is refused."""
    model = nn.Sequential(call.module)
    try:
        (planned,) = condmod.plan(model, {"0": ("film", placement)}, condition_dim=3)
    except SiteError as error:
        if "nothing is known" in str(error):
            raise
        return None
    if placement == "input":
        found = call.args[0] if call.args else call.kwargs[planned.argument]
    else:
        found = call.output
        if not isinstance(found, Tensor):
            items = list(found.values()) if isinstance(found, Mapping) else found
            found = items[planned.item]
    assert isinstance(found, Tensor)
    assert found.is_floating_point()
    assert found.shape[0] == 2
    ends = {1: found.shape[1], -1: found.shape[-1]}
    assert ends.pop(planned.site.channel_dim) == planned.site.features
    if found.ndim > 2:
        assert ends.popitem()[1] != planned.site.features, "the shape does not tell the channels"
    return found


def _path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
