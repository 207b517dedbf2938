"""Banks: many sites, what they share, and one generate for all."""

import copy
import pickle
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import condmod
from condmod import Bank, Registry, Site, SiteError, SpecError, create, create_bank


class TrunkConfig(condmod.ModulatorConfig):
    """Options of `trunk_shift`."""

    width: condmod.Width = 6


class Trunk(nn.Module):
    """What the sites share."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inside, outside)
        self.calls = 0

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        self.layer.reset_parameters()

    def forward(self, condition: Tensor) -> Tensor:
        """The condition as every site reads it."""
        self.calls += 1
        out: Tensor = self.layer(condition).tanh()
        return out


class TrunkShift(condmod.Modulator[TrunkConfig, Tensor]):
    """A trunk that all sites share, and a table of each site's own: y = x + t + trunk(c)."""

    name = "trunk_shift"
    Config = TrunkConfig
    kinds: ClassVar[frozenset[Any]] = frozenset({"global"})

    def __init__(self, config: TrunkConfig, site: Site) -> None:
        super().__init__(config, site)
        self.table = nn.Parameter(torch.empty(site.features))
        self.read = nn.Linear(config.width, site.features)
        self.reset_parameters()

    @classmethod
    def shared(cls, config: TrunkConfig, sites: Sequence[Site]) -> nn.Module:
        """The trunk."""
        assert sites[0].condition_dim is not None
        return Trunk(sites[0].condition_dim, config.width)

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        nn.init.normal_(self.table)
        self.read.reset_parameters()

    def generate(self, condition: Any) -> Tensor:
        """The shift, from the trunk's output."""
        return self.table + self.read(self.received(condition))

    def modulate(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The sum."""
        return x + condmod.functional.align(x, modulation, self.site.channel_dim)


HERE = Registry([])
HERE.register(TrunkShift)
SITES = {
    "blocks.0.norm": Site(features=4, condition_dim=3),
    "blocks.1.norm": Site(features=4, condition_dim=3),
    "out": Site(features=8, condition_dim=3, channel_dim=1),
}


@pytest.fixture
def bank() -> Iterator[Bank]:
    """A bank of three sites that share a trunk."""
    with HERE.active():
        yield create_bank("trunk_shift(width=5)", SITES)


def test_a_bank_generates_for_every_site_and_runs_what_is_shared_once(bank: Bank):
    condition = torch.randn(2, 3)
    modulations = bank.generate(condition)
    assert bank.shared is not None
    assert bank.shared.calls == 1
    trunk = bank.shared(condition)
    assert list(modulations) == list(bank) == list(SITES)
    for name in SITES:
        assert torch.equal(modulations[name], bank[name].generate(condmod.Shared(trunk)))
        assert torch.equal(modulations[name], bank(condition)[name])


def test_a_bank_without_shared_parts_equals_modulators_built_one_by_one():
    torch.manual_seed(1)
    bank = create_bank("film", SITES)
    torch.manual_seed(1)
    single = {name: create("film", site) for name, site in SITES.items()}
    condition = torch.randn(2, 3)
    assert bank.shared is None
    for name, modulation in bank.generate(condition).items():
        for mine, other in zip(modulation, single[name].generate(condition), strict=True):
            assert torch.equal(mine, other)


def test_a_modulation_of_a_bank_fits_the_features_of_its_site(bank: Bank):
    modulations = bank(torch.randn(2, 3))
    assert bank["blocks.0.norm"].modulate(torch.zeros(2, 7, 4), modulations["blocks.0.norm"]).shape
    assert bank["out"].modulate(torch.zeros(2, 8, 5, 5), modulations["out"]).shape == (2, 8, 5, 5)


def test_a_state_dict_shows_what_is_shared_once_and_dots_as_slashes(bank: Bank):
    assert sorted(bank.state_dict()) == sorted(
        [
            "shared.layer.weight",
            "shared.layer.bias",
            *(
                f"modulators.{site}.{name}"
                for site in ("blocks/0/norm", "blocks/1/norm", "out")
                for name in ("table", "read.weight", "read.bias")
            ),
        ]
    )
    other = create_bank(bank.config, SITES)
    other.load_state_dict(bank.state_dict(), strict=True)
    condition = torch.randn(2, 3)
    assert torch.equal(other(condition)["out"], bank(condition)["out"])


def test_a_bank_reads_like_a_mapping_of_sites(bank: Bank):
    assert len(bank) == 3
    assert bank.names == tuple(SITES)
    assert bank["out"].site == Site(features=8, condition_dim=3, channel_dim=1, name="out")
    assert bank["out"].where() == "trunk_shift at 'out'"
    with pytest.raises(KeyError):
        bank["blocks.2.norm"]


def test_reset_draws_what_is_shared_and_every_site_afresh(bank: Bank):
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    bank.reset_parameters()
    for name, value in bank.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_a_bank_trains_what_is_shared_and_every_site(bank: Bank):
    sum(shift.sum() for shift in bank(torch.randn(2, 3)).values()).backward()
    assert all(parameter.grad is not None for parameter in bank.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_a_bank_survives_copies_and_pickle_without_sharing_memory(bank: Bank, copied: Any):
    twin = copied(bank)
    condition = torch.randn(2, 3)
    assert torch.equal(twin(condition)["out"], bank(condition)["out"])
    assert twin.config == bank.config
    with torch.no_grad():
        twin["out"].table.zero_()
        twin.shared.layer.weight.zero_()
    assert bank["out"].table.any()
    assert bank.shared is not None
    assert bank.shared.layer.weight.any()


def test_create_refuses_what_shares_parameters_and_says_create_bank():
    with pytest.raises(SiteError) as caught:
        create("trunk_shift(width=5)", features=4, condition_dim=3, registry=HERE)
    assert str(caught.value) == (
        "trunk_shift shares parameters between its sites; build it with "
        "create_bank('trunk_shift(width=5)', {'block': site})"
    )
    with pytest.raises(SiteError, match=r"create_bank\('trunk_shift', \{'mid.norm': site\}\)"):
        create("trunk_shift", Site(4, 3, name="mid.norm"), registry=HERE)


@pytest.mark.parametrize("name", ["keys", "values", "train", "type", "training", "forward", "pop"])
def test_a_site_may_have_a_name_that_torch_uses_itself(name: str):
    bank = create_bank("film", {name: Site(4, 3), f"{name}.out": Site(4, 3)})
    assert list(bank(torch.randn(2, 3))) == [name, f"{name}.out"]
    assert f"modulators.{name}/.proj.weight" in bank.state_dict()
    assert bank.train() is bank


BAD_SITES: dict[str, tuple[dict[str, Site], str]] = {
    "none": ({}, "a bank of film needs at least one site"),
    "without a name": (
        {"": Site(4, 3)},
        "the sites of a bank have distinct names (dots read as slashes); got ''",
    ),
    "two that read the same": (
        {"a.b": Site(4, 3), "a/b": Site(4, 3)},
        "the sites of a bank have distinct names (dots read as slashes); got 'a.b'",
    ),
    "one that does not fit": (
        {"a": Site(4, 3), "b.c": Site(4)},
        "film at 'b.c' needs condition_dim, the width of its condition, as in "
        "create('film', features=4, condition_dim=128)",
    ),
}


@pytest.mark.parametrize(("sites", "message"), BAD_SITES.values(), ids=BAD_SITES)
def test_sites_that_make_no_bank_are_refused(sites: dict[str, Site], message: str):
    with pytest.raises(SiteError) as caught:
        create_bank("film", sites)
    assert str(caught.value) == message


def test_a_bank_of_encoders_is_refused():
    with pytest.raises(SpecError, match="'label' is an encoder, not a modulator"):
        create_bank("label(classes=3)", SITES)


def test_the_place_is_said_once():
    told = r"^say the place once: create\(spec, site\) or create\(spec, features=\.\.\., \.\.\.\)$"
    with pytest.raises(SiteError, match=told):
        create("film")
    with pytest.raises(SiteError, match=told):
        create("film", Site(4, 3), features=4)


BAD_PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "no features": ({"features": 0}, "Site.features is a positive integer; got 0"),
    "True": ({"features": True}, "Site.features is a positive integer; got True"),
    "a float": ({"features": 4.0}, "Site.features is a positive integer; got 4.0"),
    "a negative width": (
        {"features": 4, "condition_dim": -1},
        "Site.condition_dim is a positive integer; got -1",
    ),
    "a wrong output": (
        {"features": 4, "out_features": 0},
        "Site.out_features is a positive integer; got 0",
    ),
    "another channel": (
        {"features": 4, "channel_dim": 2},
        "Site.channel_dim is -1 for (B, ..., C) or 1 for (B, C, ...); got 2",
    ),
}


@pytest.mark.parametrize(("fields", "message"), BAD_PLACES.values(), ids=BAD_PLACES)
def test_a_site_that_cannot_be_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(SiteError) as caught:
        Site(**fields)
    assert str(caught.value) == message


BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "a slip": ({"feature": 4}, "a site has no field 'feature'; did you mean 'features'?"),
    "something else": (
        {"features": 4, "device": "cpu"},
        "a site has no field 'device'; it has features, condition_dim, channel_dim, out_features, "
        "name",
    ),
    "an option": (
        {"features": 4, "scale": "exp"},
        "'scale' is an option; it stands in the spec: film(scale=...)",
    ),
    "nothing but a width": (
        {"condition_dim": 4},
        "a site needs features, the number of channels, as in features=64",
    ),
}


@pytest.mark.parametrize(("place", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_field_that_no_site_has_is_told_with_the_nearest(place: dict[str, Any], message: str):
    with pytest.raises(SiteError) as caught:
        create("film", **place)
    assert str(caught.value) == message


def test_what_is_no_site_is_refused():
    with pytest.raises(SiteError) as caught:
        create("film", 64)  # type: ignore[arg-type]
    assert str(caught.value) == "the place of a modulator is a Site; got 64"
    for sites, came in (({"a": 64}, "'a': 64"), ({3: 4}, "3: 4")):
        with pytest.raises(SiteError) as caught:
            create_bank("film", sites)  # type: ignore[arg-type]
        assert str(caught.value) == f"the sites of a bank are Sites by name; got {came}"


@pytest.mark.parametrize("out_dim", [0, True, -3, 3.5])
def test_an_encoder_s_width_is_a_positive_integer(out_dim: Any):
    with pytest.raises(SiteError) as caught:
        condmod.create_encoder("label(classes=3)", out_dim)
    assert str(caught.value) == f"out_dim is a positive integer or None; got {out_dim!r}"


def test_a_site_that_a_bank_has_not_is_told_with_the_nearest():
    bank = create_bank("film", {"b.1": Site(4, 3), "b.2": Site(4, 3)})
    assert "b.1" in bank
    assert "b.99" not in bank
    for name, mend in (("b.9", "; did you mean 'b.2'?"), ("zzz", "; it has b.1, b.2"), (3, "")):
        with pytest.raises(KeyError) as caught:
            bank[name]  # type: ignore[index]
        assert isinstance(caught.value, condmod.CondmodError)
        told = str(caught.value)
        assert told.startswith(f"this bank of film has no site {name!r}{mend}")


@pytest.mark.parametrize("name", ["_modules", "_parameters", "training", "keys", "forward"])
def test_a_name_that_torch_keeps_for_itself_is_a_site_s_name_too(name: str):
    bank = create_bank("film", {name: Site(4, 3)})
    assert list(bank.generate(torch.ones(2, 3))) == [name]
    assert bank[name].site.name == name


@pytest.mark.parametrize(
    "spec", ["adaln_single", "wan", "flux2", "stable_audio", "cosmos", "cnaps"]
)
def test_a_site_whose_bank_shares_parameters_refuses_a_condition_of_any_width(spec: str):
    for width in (1, 4, 24):
        bank = create_bank(spec, {"a": Site(4, width)})
        site, c = bank["a"], torch.randn(2, width)
        sublayers = [torch.tanh] * getattr(site, "parts", 0)
        for call in (lambda: site(torch.randn(2, 5, 4), c, *sublayers), lambda: site.generate(c)):  # noqa: B023
            with pytest.raises(condmod.ConditionError) as caught:
                call()
            assert str(caught.value) == (
                f"{spec} at 'a' generates from what the sites of its bank share, not from a "
                "condition: take its modulation from bank(condition), and call modulate or around"
            )


def test_an_aligned_condition_is_refused_where_sites_disagree_on_the_channels_end():
    sites = {"a": Site(4, 3), "b": Site(4, 3, channel_dim=1)}
    bank = create_bank("adaln_single", sites)
    assert list(bank(torch.randn(2, 3))) == ["a", "b"]
    with pytest.raises(condmod.ShapeError) as caught:
        bank(torch.randn(2, 5, 3))
    assert str(caught.value) == (
        "adaln_single: an aligned condition fits sites with their channels at one end; this bank "
        "has sites of both"
    )


def test_the_sites_of_a_bank_are_a_mapping():
    with pytest.raises(condmod.SiteError) as caught:
        create_bank("film", [Site(4, 3)])  # type: ignore[arg-type]
    assert str(caught.value) == (
        "the sites of a bank are Sites by name, as in {'blocks.0': Site(64, 128)}; got list"
    )
