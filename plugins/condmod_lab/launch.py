"""Accelerate's view of the machine, as a config asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    LoggerType,
    ProjectConfiguration,
    parse_flag_from_env,
)

from condmod_lab.config import TrainConfig
from condmod_lab.errors import ConfigError

_PRECISION: Final = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """The accelerator of a run, on as many processes as it was launched on.

    Args:
        config: the run; its batch is shared out over processes and accumulated parts.
        folder: the run folder; trackers that keep files keep them in `tracking` there.

    Raises:
        ConfigError: a tracker is unknown or not installed, the precision does not run here, the
            environment tells of processes that are not there or asks for accelerate's own FSDP, or
            the batch cannot be shared out.
    """
    training = config.training
    _check_trackers(config.trackers)
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ConfigError(
            "accelerate's own FSDP wraps networks that it does not know; launch without --use_fsdp "
            "and set training.sharding to fsdp2"
        )
    # Accelerate keeps one state per process, and a run before this one may have had another.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else torchrun's CPU processes are not seen
            mixed_precision=_PRECISION[training.precision],
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=training.accumulate, sync_with_dataloader=False
            ),
            dataloader_config=DataLoaderConfiguration(split_batches=True),  # as the schedule steps
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(str(folder), str(folder / "tracking")),
        )
    except ValueError as error:
        raise ConfigError(
            f"accelerate cannot start with training.precision {training.precision} and what the "
            f"environment says of other processes (WORLD_SIZE, LOCAL_RANK, MASTER_ADDR): {error}"
        ) from None
    shares = accelerator.num_processes * training.accumulate
    if training.batch % shares:
        raise ConfigError(
            "training.batch is shared out equally over processes and accumulated parts; "
            f"{training.batch} images do not go into {accelerator.num_processes} x "
            f"{training.accumulate}; {training.batch // shares * shares or shares} do"
        )
    return accelerator


def _check_trackers(names: tuple[str, ...]) -> None:
    known = sorted(set(LoggerType.list()) - {"all"})
    here = set(map(str, get_available_trackers()))
    for name in names:
        if name not in known:
            raise ConfigError(f"trackers should be of {', '.join(known)}; got {name!r}")
        if name not in here:
            package = "'condmod[tracking]'" if name == "tensorboard" else name
            raise ConfigError(
                f"the tracker {name!r} is not installed; install it with: pip install {package}"
            )
