"""From a spec to a module: create, create_encoder, create_with_encoder, describe."""

from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

import condmod
from condmod import Registry, Site, SiteError, SpecError, create, create_encoder, describe


class PlainConfig(condmod.ModulatorConfig):
    """Options of `plain`."""

    mode: Literal["a", "b"] = "a"
    """Which of
    the two."""
    widths: tuple[condmod.Width, ...] = (1, 2)
    rate: float | None = None
    inner: condmod.ModulatorSpec = "plain"
    encoders: condmod.FrozenMapping[str, condmod.EncoderSpec] = condmod.FrozenMapping()
    count: int


class Plain(condmod.Modulator[PlainConfig, Tensor]):
    """One line that
    says what it is.

    And more below.
    """

    name = "plain"
    aliases = ("plane",)
    Config = PlainConfig
    kinds: ClassVar[frozenset[Any]] = frozenset({"global", "aligned"})
    waivers: ClassVar[dict[str, str]] = {"rows": "it looks at them all"}

    def reset_parameters(self) -> None:
        """Draw nothing."""

    def generate(self, condition: condmod.Condition) -> Tensor:
        """The condition itself."""
        return self.accept(condition)

    def modulate(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The product."""
        return x * condmod.functional.align(x, modulation, self.site.channel_dim)


HERE = Registry([])
HERE.register(Plain)


def test_a_description_tells_what_people_ask_of_a_component():
    described = describe("plain", registry=HERE)
    assert described.name == "plain"
    assert described.role == "modulator"
    assert described.summary == "One line that says what it is."
    assert described.doc.endswith("\n\nAnd more below.")
    assert described.kinds == ("aligned", "global")
    assert described.aliases == ("plane",)
    assert described.waivers == {"rows": "it looks at them all"}
    assert described.site_params is False
    assert [(option.name, option.type, option.default) for option in described.options] == [
        ("mode", "'a' | 'b'", "'a'"),
        ("widths", "list of integer from 1 to 65536", "[1, 2]"),
        ("rate", "number | None", "None"),
        ("inner", "modulator spec", "'plain'"),
        ("encoders", "mapping of encoder spec", "{}"),
        ("count", "integer", "required"),
    ]
    assert described.options[0].description == "Which of the two."
    assert described.to_dict()["entry"]["name"] == "plain"


def test_text_mapping_spec_and_config_build_the_same_module():
    site = Site(features=4, condition_dim=3)
    states = []
    for spec in (
        "film(scale='one_plus')",
        {"name": "film", "scale": "one_plus"},
        condmod.parse("film(scale='one_plus')"),
        condmod.configure("film(scale='one_plus')"),
    ):
        torch.manual_seed(0)
        states.append(create(spec, site).state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])


def test_a_site_may_be_given_by_its_fields():
    modulator = create("film", features=4, condition_dim=3, channel_dim=1, name="here")
    assert modulator.site == Site(4, 3, channel_dim=1, name="here")
    assert modulator(torch.randn(2, 4, 5), torch.randn(2, 3)).shape == (2, 4, 5)


def test_an_encoder_is_no_modulator_and_the_other_way_round():
    with pytest.raises(SpecError, match="'label' is an encoder, not a modulator"):
        create("label(classes=3)", features=4)
    with pytest.raises(SpecError, match="'film' is a modulator, not an encoder"):
        create_encoder("film")


def test_a_modulator_says_which_condition_it_needs():
    with pytest.raises(SiteError) as caught:
        create("film", features=4, name="block.3")
    assert str(caught.value) == (
        "film at 'block.3' needs condition_dim, the width of its condition, as in "
        "create('film', features=4, condition_dim=128)"
    )


def test_an_encoder_gives_its_width_to_the_modulator_beside_it():
    encoder, modulator = condmod.create_with_encoder(
        "film", "vector(features=5)", Site(features=4, channel_dim=1)
    )
    assert modulator.site == Site(4, encoder.out_dim, channel_dim=1)
    x = torch.randn(2, 4, 3)
    assert modulator(x, encoder(torch.randn(2, 5))).shape == x.shape


def test_what_acts_around_sublayers_cannot_stand_inside_another_modulator():
    with pytest.raises(SpecError) as caught:
        condmod.create_with_encoder("adaln_zero", "vector(features=5)", Site(features=4))
    assert str(caught.value) == (
        "adaln_zero cannot stand inside a modulator that owns its encoder: it must turn features "
        "into features and take a global or aligned condition; build the encoder beside it with "
        "create_encoder"
    )


def test_the_printout_of_a_model_shows_spec_and_site():
    modulator = create("film(scale='one_plus')", features=4, condition_dim=3, name="b")
    assert repr(modulator).splitlines()[1].strip() == (
        "film(scale='one_plus'), Site(features=4, condition_dim=3, channel_dim=-1, "
        "out_features=None, name='b')"
    )
