"""The backbone takes whatever turns a global condition into features, and says what it cannot."""

from collections.abc import Callable

import pytest
import torch

import condmod
from condmod import SiteError
from condmod_lab.backbone import build
from condmod_lab.config import TrainConfig, make_config

Tiny = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    "modulator",
    [
        "film",
        "dense_film(residual=True)",
        "ada_group_norm(groups=4)",
        "adaln_zero(parts=1)",
        "adaln_zero(parts=2)",
        "add",
        "concat_project",
        "none",
    ],
)
def test_every_shipped_modulator_of_a_global_condition_fits(tiny: Tiny, modulator: str) -> None:
    net = build(tiny(modulator=modulator))
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    velocity = net(x, torch.rand(4), labels, labels > 0)
    assert velocity.shape == x.shape
    velocity.square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.blocks.parameters())


def test_the_default_network_has_about_a_hundred_thousand_parameters() -> None:
    parameters = sum(parameter.numel() for parameter in build(TrainConfig()).parameters())
    assert 90_000 < parameters < 115_000


def test_class_time_and_presence_all_reach_the_velocity(tiny: Tiny) -> None:
    net = build(tiny())
    x, t, labels, here = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2]), torch.ones(2)
    base = net(x, t, labels, here.bool())
    for other in (
        net(x, t / 2, labels, here.bool()),
        net(x, t, labels + 1, here.bool()),
        net(x, t, labels, ~here.bool()),
    ):
        assert not torch.allclose(base, other, atol=1e-5)
    assert torch.equal(net(x, t, labels, ~here.bool()), net(x, t, labels + 1, ~here.bool()))


@pytest.mark.parametrize("modulator", ["per_timestep(inner=film, encoder=timestep)"])
def test_a_modulator_of_raw_signals_is_refused_with_place_spec_and_reason(
    tiny: Tiny, modulator: str
) -> None:
    config = tiny(modulator=modulator)
    with pytest.raises(condmod.SiteError) as caught:
        build(config)
    assert str(caught.value) == (
        "the place 'blocks.0.modulator' offers one embedding of time and class for a whole image "
        f"(a global condition); {config.modulator} takes raw conditions; "
        "fill it with another modulator, such as dense_film"
    )


def test_a_modulator_around_more_sublayers_than_a_block_has_is_refused(tiny: Tiny) -> None:
    with pytest.raises(condmod.SiteError) as caught:
        build(tiny(modulator="adaln_zero(parts=3)"))
    assert str(caught.value) == (
        "the place 'blocks.0.modulator' has two convolutions, so it takes a modulator around 1 or "
        "2 sublayers; adaln_zero(parts=3) acts around 3"
    )


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ("timestep", "timestep"),
        ("fuse(inputs={'time': timestep})", "label"),
        ("fuse(inputs={'time': timestep, 'label': label(classes=10)})", "nullable=True"),
        ("fuse(inputs={'time': timestep, 'label': label(classes=9, nullable=True)})", "got 0 to 9"),
    ],
)
def test_an_encoder_that_does_not_fit_shows_before_training(
    tiny: Tiny, encoder: str, words: str
) -> None:
    with pytest.raises(condmod.CondmodError, match=words):
        build(tiny(encoder=encoder))


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        ("timestep", "timestep takes one tensor, without an index; got dict"),
        (
            "fuse(inputs={'time': timestep})",
            "fuse takes a mapping with the keys ['time']; missing [], surplus ['label']",
        ),
    ],
)
def test_an_encoder_that_does_not_fit_is_told_what_it_is_given(encoder: str, reason: str) -> None:
    with pytest.raises(SiteError) as caught:
        build(make_config({"encoder": encoder}))
    text = str(caught.value)
    assert "as the config's encoder it is given {'time': times (B,), 'label': classes" in text
    assert text.endswith(reason)
