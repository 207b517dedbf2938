"""The sampler looks modulations up where that is less work, and draws the same samples."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from condmod import Schedule
from condmod_lab import scheduling, workflow
from condmod_lab.config import TrainConfig
from condmod_lab.network import Network, build
from condmod_lab.scheduling import schedule_of
from condmod_lab.sections import SamplingConfig
from condmod_lab.workflow import draw_images

Tiny = Callable[..., TrainConfig]

CONV = {"channels": 8, "blocks": 2, "condition_dim": 8}
TRANSFORMER = {"name": "transformer", **CONV}
OWN_ENCODER = (
    "multi_condition(inner=dense_film, encoder=fuse(inputs={'time': timestep(dim=64, "
    "scale=1000.0), 'label': label(classes=10, nullable=True)}))"
)
SHAPE = (1, 8, 8)


def make(tiny: Tiny, modulator: str = "film", backbone: dict[str, Any] = CONV) -> Network:
    torch.manual_seed(3)
    net = build(tiny(backbone=backbone, modulator=modulator), 10, SHAPE)
    with torch.no_grad():
        for parameter in net.body.bank.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return net


def sampling(steps: int = 5, guidance: float = 1.0) -> SamplingConfig:
    return SamplingConfig(steps=steps, guidance=guidance)


def table(
    net: Network, labels: torch.Tensor, *, present: bool = True, guidance: float = 1.0
) -> Schedule | None:
    noise = torch.randn(len(labels), *SHAPE)
    return schedule_of(net, noise, labels, sampling(guidance=guidance), present=present)


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("backbone", [CONV, TRANSFORMER], ids=["conv", "transformer"])
@pytest.mark.parametrize(
    "modulator",
    ["film", "adaln_zero", "adaln_single", "ada_group_norm(groups=4)", "cnaps", OWN_ENCODER],
)
def test_samples_are_those_of_a_network_that_generates_at_every_step(
    tiny: Tiny,
    backbone: dict[str, Any],
    modulator: str,
    guidance: float,
    present: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, labels, calls = make(tiny, modulator, backbone), torch.arange(60) % 10, []
    net.body.bank.register_forward_hook(lambda *_: calls.append(1))

    def drawn() -> torch.Tensor:
        calls.clear()
        return draw_images(net, labels, SHAPE, sampling(guidance=guidance), seed=3, present=present)

    looked_up = drawn()
    assert len(calls) == 2  # one row, for its size, and the table
    monkeypatch.setattr(workflow, "schedule_of", lambda *_, **__: None)
    generated = drawn()
    assert len(calls) == (5 if guidance == 1.0 else 10)
    torch.testing.assert_close(looked_up, generated, rtol=1e-4, atol=1e-5)
    other = draw_images(net, labels, SHAPE, sampling(), seed=3, present=not present)
    assert not torch.allclose(other, generated, atol=1e-3)


@pytest.mark.parametrize(
    ("count", "classes", "guidance", "rows"),
    [
        (20, 10, 1.0, 5 * 10),
        (19, 10, 1.0, None),  # 95 rows are generated for 50
        (20, 10, 3.0, 5 * 10 * 2),
        (19, 10, 3.0, None),
        (1, 1, 3.0, None),
        (2, 1, 1.0, 5),
    ],
)
def test_a_table_is_used_where_it_saves_at_least_every_second_row(
    tiny: Tiny, count: int, classes: int, guidance: float, rows: int | None
) -> None:
    found = table(make(tiny), torch.arange(count) % classes, guidance=guidance)
    assert (None if found is None else found.rows) == rows


def test_no_table_is_larger_than_its_limit(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    net, labels = make(tiny), torch.arange(40) % 10
    found = table(net, labels)
    assert found is not None
    content = found.table_bytes * found.rows // (found.rows + 1)  # less the row of NaN
    monkeypatch.setattr(scheduling, "_LARGEST", content)
    assert table(net, labels) is not None
    monkeypatch.setattr(scheduling, "_LARGEST", content - 1)
    assert table(net, labels) is None


def test_there_is_no_table_in_training_nor_without_modulations(tiny: Tiny) -> None:
    labels = torch.arange(40) % 10
    assert table(make(tiny, "none"), labels) is None
    assert table(make(tiny).train(), labels) is None
    assert table(make(tiny), labels[:0]) is None


def test_parameters_of_another_kind_than_torch_s_own_get_no_table(tiny: Tiny) -> None:
    class Sharded(torch.Tensor):
        """A parameter as a library shares it out."""

    net, labels = make(tiny), torch.arange(40) % 10
    assert table(net, labels) is not None
    layer = net.body.bank[net.body.bank.names[0]].proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Sharded))
    assert table(net, labels) is None
