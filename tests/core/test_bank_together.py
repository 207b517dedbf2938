"""A bank of linear generators prepares once and projects together; each site gets its own."""

import copy
import importlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import condmod
from condmod import Bank, Site, create_bank, generate_linear
from condmod.functional import projecting
from condmod.testing import ModulatorCase
from condmod.testing.cases import stir

LAWS = Path(__file__).parents[1] / "laws"
sys.path.insert(0, str(LAWS))
CASES: dict[str, ModulatorCase] = {
    case.name: case
    for table in sorted(LAWS.glob("cases_*.py"))
    for case in importlib.import_module(table.stem).CASES
    if isinstance(case, ModulatorCase)
    and case.component.generate is generate_linear
    and not case.registry
}


def bank_of(spec: Any, *sites: Site) -> Bank:
    """A bank in which no two parameters are equal."""
    bank = create_bank(spec, {f"blocks.{i}": site for i, site in enumerate(sites)})
    stir(bank)
    return bank


def leaves(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [leaf for part in tree for leaf in leaves(part)]


def equal(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def differs(bank: Bank, condition: Any) -> list[str]:
    """The sites whose modulation is not, bit for bit, what they generate on their own."""
    found, single = bank(condition), {name: bank[name].generate(condition) for name in bank}
    assert list(found) == list(single)
    return [
        name
        for name in bank
        if type(found[name]) is not type(single[name])
        or not equal(leaves(found[name]), leaves(single[name]))
    ]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each site has prepared a condition, by name."""
    counts: Counter[str] = Counter()
    accept = condmod.Component.accept

    def counted(self: condmod.Component[Any, Any], condition: Any) -> Tensor:
        counts[self.site.name] += 1
        return accept(self, condition)

    monkeypatch.setattr(condmod.Component, "accept", counted)
    return counts


def test_the_table_has_every_linear_component():
    registered = {condmod.configure(name).component for name in _buildable()}
    linear = {component for component in registered if component.generate is generate_linear}
    assert {case.component for case in CASES.values()} >= linear
    assert len(linear) > 25


def _buildable() -> list[str]:
    found = []
    for name in condmod.list_modulators():
        try:
            condmod.configure(name)
        except condmod.SpecError:  # it has an option that must be said: owned ones, none linear
            continue
        found.append(name)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_bank_gives_each_site_what_it_generates_alone(case: ModulatorCase):
    bank = bank_of(case.config, case.site, case.site, case.site).train()
    _, condition = case.inputs(3)
    assert differs(bank, condition) == []


@pytest.mark.parametrize(
    ("spec", "once"),
    [
        ("film", True),
        ("film(hidden=[8])", False),
        ("adaln_zero", True),
        ("adaln", True),
        ("adaln(affine=True)", False),  # for its norm's parameters, which prepare does not read
        ("adaln_single", False),
        ("add", True),
    ],
)
def test_prepare_runs_once_where_it_has_no_parameters(
    spec: str, once: bool, prepared: Counter[str]
):
    bank = bank_of(spec, Site(4, 6), Site(4, 6), Site(4, 6))
    bank(torch.randn(2, 6))
    first, others = prepared["blocks.0"], prepared["blocks.1"] + prepared["blocks.2"]
    assert first == 1
    assert others == (0 if once or bank.shared is not None else 2)


def test_to_prepare_once_with_parameters_of_its_own_would_be_seen():
    bank = bank_of("film(hidden=[8])", Site(4, 6), Site(4, 6))
    assert differs(bank, torch.randn(2, 6)) == []
    bank._together = True
    assert differs(bank, torch.randn(2, 6)) == ["blocks.1"]


@pytest.mark.parametrize("spec", ["film", "adaln_zero", "dense_film"])
def test_rows_and_aligned_conditions_of_sites_of_several_sizes(spec: str):
    bank = bank_of(spec, Site(4, 6), Site(10, 6), Site(4, 6))
    rows = condmod.Signal(torch.randn(2, 3, 6), index=torch.randint(3, (2, 7)))
    for condition in (rows, torch.randn(2, 7, 6), torch.randn(0, 6)):
        assert differs(bank, condition) == []
    first = bank_of(spec, Site(4, 6, channel_dim=1), Site(10, 6, channel_dim=1))
    assert differs(first, torch.randn(2, 6, 7)) == []


def test_sites_with_their_channels_at_two_ends_accept_for_themselves():
    bank = bank_of("film", Site(4, 6), Site(4, 6, channel_dim=1))
    assert differs(bank, torch.randn(2, 6)) == []
    assert differs(bank, torch.randn(2, 6, 6)) == []
    with pytest.raises(condmod.ShapeError, match=r"film at \'blocks\.1\' takes"):
        bank(torch.randn(2, 5, 6))


def test_a_wrong_condition_is_told_with_the_site_that_it_does_not_fit():
    with pytest.raises(condmod.ShapeError, match=r"film at \'blocks\.0\' takes"):
        bank_of("film", Site(4, 6), Site(4, 6))(torch.randn(2, 5))
    with pytest.raises(condmod.ShapeError, match=r"film at \'blocks\.1\' takes"):
        bank_of("film", Site(4, 6), Site(4, 5))(torch.randn(2, 6))


def test_what_stands_in_front_of_one_generate_is_called():
    bank, seen = bank_of("film", Site(4, 6), Site(4, 6)), []
    own = bank["blocks.1"].generate

    def generate(condition: Any) -> Any:
        seen.append(condition)
        return own(condition)

    bank["blocks.1"].generate = generate
    condition = torch.randn(2, 6)
    bank(condition)
    assert seen == [condition]


@pytest.mark.parametrize("large", [0, 2**40], ids=["by weight", "by rows"])
def test_gradients_are_those_of_a_loop_over_the_sites(large: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(projecting, "_LARGE", large)
    bank = bank_of("adaln_zero", Site(4, 6), Site(8, 6))
    condition = torch.randn(2, 6, requires_grad=True)
    wanted = [condition, *bank.parameters()]

    def gradients(made: dict[str, Any]) -> tuple[Tensor, ...]:
        outs = [leaf for name in bank for leaf in leaves(made[name])]
        return torch.autograd.grad(sum(out.sin().sum() for out in outs), wanted)

    together = gradients(bank(condition))
    loop = gradients({name: bank[name].generate(condition) for name in bank})
    torch.testing.assert_close(together[0], loop[0])  # it is summed before silu's, not behind
    assert equal(together[1:], loop[1:])


@pytest.mark.parametrize("spec", ["film", "adaln_zero", "film(hidden=[8])"])
def test_a_bank_compiles_to_one_graph_that_serves_every_batch(spec: str):
    bank, graphs = bank_of(spec, Site(4, 6), Site(8, 6)), []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(bank, fullgraph=True, dynamic=True, backend=keep)
    for batch in (2, 3, 9):
        condition = torch.randn(batch, 6)
        want = bank(condition)
        for name, made in compiled(condition).items():
            torch.testing.assert_close(leaves(made), leaves(want[name]))
    assert len(graphs) == 1
    traced = torch.compile(bank, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(leaves(traced(condition).values()), leaves(want.values()))


def test_a_lora_like_layer_in_the_place_of_one_projection_is_called(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(projecting, "_LARGE", 0)

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.up = nn.Linear(base.in_features, base.out_features)

        def forward(self, c: Tensor) -> Tensor:
            out: Tensor = self.base(c) + self.up(c)
            return out

    bank = bank_of("film", Site(4, 6), Site(4, 6))
    bank["blocks.1"].proj = Adapted(bank["blocks.1"].proj)
    condition = torch.randn(2, 6)
    with torch.no_grad():
        made = bank(condition)["blocks.1"]
        torch.testing.assert_close(torch.cat(list(made), -1), bank["blocks.1"].proj(condition))


class OwnShiftConfig(condmod.ModulatorConfig):
    """Options of `own_shift`."""


class OwnShift(condmod.Modulator[OwnShiftConfig, Tensor]):
    """A linear generator's three steps, and more in `generate` than these."""

    name = "own_shift"
    Config = OwnShiftConfig
    kinds = frozenset({"global"})
    prepare = condmod.Component.accept

    def __init__(self, config: OwnShiftConfig, site: Site) -> None:
        super().__init__(config, site)
        self.proj = nn.Linear(self.condition_dim, site.features)

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.proj.reset_parameters()

    def unpack(self, projected: Tensor) -> Tensor:
        """The shift."""
        return projected

    def generate(self, condition: Any) -> Tensor:
        """Twice the shift."""
        return 2 * self.unpack(self.proj(self.prepare(condition)))

    def modulate(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The sum."""
        return x + condmod.functional.align(x, modulation)


def test_a_generate_of_its_own_is_called():
    registry = condmod.Registry([])
    registry.register(OwnShift)
    with registry.active():
        assert differs(bank_of("own_shift", Site(4, 6), Site(4, 6)), torch.randn(2, 6)) == []


def test_a_copy_of_a_bank_generates_from_its_own_weights():
    bank = bank_of("adaln_zero", Site(4, 6), Site(8, 6))
    twin, condition = copy.deepcopy(bank), torch.randn(2, 6)
    stir(bank)
    assert differs(twin, condition) == []
    before, after = (leaves(one(condition).values()) for one in (twin, bank))
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("step", ["prepare", "unpack"])
def test_a_step_that_someone_has_put_in_front_is_taken(step: str):
    bank = condmod.create_bank("film", {"a": condmod.Site(4, 3), "b": condmod.Site(4, 3)})
    taken: list[str] = []
    inner = getattr(bank["b"], step)

    def own(given: Any) -> Any:
        taken.append(step)
        return inner(given)

    setattr(bank["b"], step, own)
    bank(torch.randn(2, 3))
    assert taken == [step]


def test_a_modulator_in_the_place_of_another_generates_by_itself():
    bank = condmod.create_bank("film", {"a": condmod.Site(4, 3), "b": condmod.Site(4, 3)})
    bank.modulators["b"] = condmod.create("film(hidden=[5])", features=4, condition_dim=3)
    c = torch.randn(2, 3)
    for got, wanted in zip(bank(c)["b"], bank["b"].generate(c), strict=True):
        assert torch.equal(got, wanted)
