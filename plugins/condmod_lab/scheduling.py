"""When and how a sampler looks its modulations up in a table."""

from __future__ import annotations

from typing import Final, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from condmod import Schedule
from condmod_lab.flow import Velocity, times
from condmod_lab.network import Network, signals_of
from condmod_lab.sections import SamplingConfig

_LARGEST: Final = 256 * 2**20
_SAVES: Final = 2


@torch.no_grad()
def schedule_of(
    net: Network,
    noise: Tensor,
    labels: Int[Tensor, " B"],
    sampling: SamplingConfig,
    *,
    present: bool,
) -> Schedule | None:
    """All modulations that drawing needs as a table, where that is less work than without.

    The table has a row for each step, each class that is drawn, and each presence of labels;
    without it, every call of the network generates a row for each sample. A table pays where it
    saves at least every second row, since a row that is looked up is not free either, and where it
    stays under 256 MiB. There is none where the network has no modulations, is not in eval mode,
    or has parameters that are shared out over processes.

    Args:
        net: the network that draws.
        noise: what it starts from; of its dtype and device the times are.
        labels: (B,), the class of each image.
        sampling: how to draw.
        present: False where all is drawn under the null condition.
    """
    plain = all(type(parameter) is nn.Parameter for parameter in net.parameters())
    if net.training or not plain:
        return None
    guided = sampling.guidance != 1.0
    classes = cast(Tensor, torch.unique(labels))
    presences = torch.tensor(sorted({present, present and not guided}))
    rows = sampling.steps * len(classes) * len(presences)
    if not 0 < rows * _SAVES <= sampling.steps * len(labels) * (1 + guided):
        return None
    parts = [part for part in (net.encoder, net.body.bank) if part is not None]
    generator = nn.Sequential(*parts).eval()
    keys = [key.to(noise.device) for key in (times(sampling.steps, noise), classes, presences)]
    one = Schedule(generator, signals_of(*(key[:1] for key in keys)))
    size = rows * one.table_bytes // 2  # it has its row, and that of missing values
    return Schedule(generator, signals_of(*keys)) if 0 < size <= _LARGEST else None


def scheduled(net: Network, schedule: Schedule) -> Velocity:
    """The network's velocity, its modulations looked up."""

    def velocity(x: Tensor, t: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        made = schedule(signals_of(t, labels, present))
        return cast(Tensor, net.body(x, None, made))

    return velocity
