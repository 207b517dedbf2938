"""A spec that fits no place of a network is refused before training, with place and reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import condmod
from condmod import ShapeError, Site, SiteError
from condmod_lab.config import TrainConfig
from condmod_lab.network import Network, build
from condmod_lab.places import fill

Tiny = Callable[..., TrainConfig]

CONV = {"channels": 8, "blocks": 1, "condition_dim": 8}
TRANSFORMER = {"name": "transformer", **CONV}

both = pytest.mark.parametrize("backbone", [CONV, TRANSFORMER], ids=["conv", "transformer"])


def make(tiny: Tiny, backbone: dict[str, Any], modulator: str = "film", **fields: Any) -> Network:
    return build(tiny(backbone=backbone, modulator=modulator, **fields), 10, (1, 8, 8))


@pytest.mark.parametrize("modulator", ["per_timestep", "timestep_table"])
@pytest.mark.parametrize(
    ("backbone", "place"),
    [(CONV, "blocks.0.modulator"), (TRANSFORMER, "blocks.0.attention")],
    ids=["conv", "transformer"],
)
def test_a_modulator_of_other_signals_is_refused_with_place_spec_and_reason(
    tiny: Tiny, backbone: dict[str, Any], place: str, modulator: str
) -> None:
    reasons = {
        "per_timestep": ": timestep takes one tensor, without an index; got dict",
        "timestep_table": " takes one tensor of steps, without presence or index; got dict",
    }
    with pytest.raises(SiteError) as caught:
        make(tiny, backbone, modulator)
    assert str(caught.value) == (
        f"{modulator} does not fit the places of the network: each gives it {{'time': times (B,), "
        "'label': classes (B,) from 0 to 9, some of them absent}: "
        f"{modulator} at '{place}'{reasons[modulator]}; what takes both is, for one, "
        "multi_condition(encoder=fuse(inputs={'time': timestep(scale=1000.0), "
        "'label': label(classes=10, nullable=True)}))"
    )


@both
def test_the_modulator_that_a_refusal_names_fits(tiny: Tiny, backbone: dict[str, Any]) -> None:
    with pytest.raises(SiteError) as caught:
        make(tiny, backbone, "per_timestep")
    make(tiny, backbone, str(caught.value).partition("for one, ")[2])


@pytest.mark.parametrize(
    ("backbone", "place"),
    [
        (CONV, "the place 'blocks.0.modulator' has two convolutions"),
        (TRANSFORMER, "the place 'blocks.0' has two sublayers, attention and feed-forward"),
    ],
    ids=["conv", "transformer"],
)
@pytest.mark.parametrize(
    ("spec", "parts"),
    [("adaln_zero(parts=3)", 3), ("adaln_single(parts=4)", 4), ("sd35", 3), ("cogview3", 4)],
)
def test_a_modulator_around_more_sublayers_than_a_block_has_is_refused(
    tiny: Tiny, backbone: dict[str, Any], place: str, spec: str, parts: int
) -> None:
    with pytest.raises(SiteError) as caught:
        make(tiny, backbone, spec)
    assert str(caught.value) == (
        f"{place}, so it takes a modulator around 1 or 2 sublayers; {spec} acts around {parts}"
    )


class RowsConfig(condmod.ModulatorConfig):
    pass


class Rows(condmod.Modulator[RowsConfig, Any]):
    name = "acme.rows"
    Config = RowsConfig
    kinds = frozenset({"rows"})


class DemodulateConfig(condmod.ModulatorConfig):
    pass


class Demodulate(condmod.SublayerModulator[DemodulateConfig, Any]):
    name = "acme.demodulate"
    Config = DemodulateConfig
    kinds = frozenset({"global"})
    reads_weight = True


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            RowsConfig(),
            "the place 'blocks.0' offers one embedding of time and class for a whole image (a "
            "global condition), or the signals {'time': ..., 'label': ...} themselves (a raw "
            "condition); acme.rows takes rows conditions; "
            "fill it with another modulator, such as dense_film",
        ),
        (
            DemodulateConfig(),
            "the place 'blocks.0' has sublayers of several layers; acme.demodulate reads the "
            "weight of a single one; fill it with another modulator, such as adaln_zero",
        ),
        (
            condmod.configure("multi_condition(inner=adaln_zero, encoder=timestep)"),
            "the place 'blocks.0' cannot be filled with multi_condition(inner=adaln_zero, "
            "encoder=timestep): adaln_zero cannot stand inside a modulator that owns its encoder: "
            "it must turn features into features and take a global or aligned condition; "
            "build the encoder beside it with create_encoder",
        ),
        (
            condmod.configure("ada_group_norm(groups=3)"),
            "ada_group_norm at 'blocks.0': groups=3 does not divide features=8; "
            "choose groups from [1, 2, 4, 8]",
        ),
    ],
    ids=["rows", "weight", "nested", "groups"],
)
def test_what_no_place_can_take_is_refused_with_the_reason(
    spec: condmod.ModulatorConfig, message: str
) -> None:
    with pytest.raises(SiteError) as caught:
        fill(spec, Site(8, 8), ["blocks.0", "blocks.1"])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        ("timestep", "timestep takes one tensor, without an index; got dict"),
        (
            "fuse(inputs={'time': timestep})",
            "fuse takes a mapping with the keys ['time']; missing [], surplus ['label']",
        ),
        (
            "fuse(inputs={'time': timestep, 'label': label(classes=10)})",
            "label has no null for an absent signal; declare it with label(nullable=True)",
        ),
        (
            "fuse(inputs={'time': timestep, 'label': label(nullable=True, classes=9)})",
            "label has the classes 0 to 8; got 0 to 9",
        ),
    ],
)
@both
def test_an_encoder_that_does_not_fit_is_told_what_it_is_given(
    tiny: Tiny, backbone: dict[str, Any], encoder: str, reason: str
) -> None:
    with pytest.raises(SiteError) as caught:
        make(tiny, backbone, encoder=encoder)
    assert str(caught.value) == (
        f"{encoder} does not fit the data: as the config's encoder it is given {{'time': times "
        f"(B,), 'label': classes (B,) from 0 to 9, some of them absent}}: {reason}"
    )


@pytest.mark.parametrize("modulator", ["film", "none", "adaln_zero", "adaln_single"])
@both
def test_features_and_condition_of_unequal_batches_are_refused_at_the_first_place(
    tiny: Tiny, backbone: dict[str, Any], modulator: str
) -> None:
    body = make(tiny, backbone, modulator).body
    with pytest.raises(ShapeError, match=rf"^{modulator} at 'blocks\.0.* a condition \(1, 8\)$"):
        body(torch.zeros(3, 1, 8, 8), torch.zeros(1, 8))
