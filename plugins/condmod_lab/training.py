"""The training loop, on accelerate: the same code on one CPU and on many devices."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from rich.console import Console
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from condmod_lab.backbone import DigitNet, build
from condmod_lab.config import TrainConfig
from condmod_lab.data import Digits
from condmod_lab.errors import ConfigError, DivergedError, RunFolderError
from condmod_lab.flow import flow_loss
from condmod_lab.progress import track
from condmod_lab.run_folder import RunFolder, writing


def make_accelerator() -> Accelerator:
    """Accelerate's view of the machine; `training.batch` is shared out over its processes."""
    return Accelerator(
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    )


def train(
    config: TrainConfig,
    digits: Digits,
    folder: RunFolder,
    accelerator: Accelerator,
    console: Console,
    *,
    overwrite: bool = False,
) -> DigitNet:
    """Train a network and leave its checkpoint and log in the run folder.

    Ctrl-C writes a checkpoint before it goes on its way.

    Args:
        config: the run.
        digits: what to learn from.
        folder: where checkpoint and log go; claimed once the network is known to fit.
        accelerator: where to run.
        console: where progress goes.
        overwrite: whether a former run in the folder may be replaced.

    Returns:
        The network with averaged weights, in eval mode.

    Raises:
        DivergedError: the loss is not finite; says the step, and keeps the last checkpoint.
        ConfigError: there are fewer digits than a batch holds.
        RunFolderError: the folder cannot be written, or holds something already.
        CondmodError: the config's modulator or encoder does not fit the network.
    """
    set_seed(config.seed, device_specific=True)
    loop = _Loop(config, digits, folder, accelerator)
    if accelerator.is_main_process:
        folder.claim(config, overwrite=overwrite)
    accelerator.wait_for_everyone()
    _tell(console, f"training {config.modulator}, {config.training.steps} steps, in {folder.path}")
    try:
        with writing(folder.path):
            loop.run(console)
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            _tell(console, _kept(loop, folder))
        raise
    return loop.averaged


def _kept(loop: _Loop, folder: RunFolder) -> str:
    """Save what an interrupted run has learned, and say where it is."""
    try:
        loop.save()
    except RunFolderError as error:
        return f"interrupted: the checkpoint of step {loop.done} could not be kept: {error}"
    return f"interrupted: the checkpoint of step {loop.done} is in {folder.checkpoint}"


def _tell(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


class _Loop:
    """The parts of one run, and how many steps of it are done."""

    def __init__(
        self, config: TrainConfig, digits: Digits, folder: RunFolder, accelerator: Accelerator
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        training = config.training
        if training.batch > len(digits):
            raise ConfigError(
                f"training.batch is at most the number of digits to learn from, {len(digits)}; "
                f"got {training.batch}"
            )
        self.net = build(config).train()
        self.average = AveragedModel(
            self.net, accelerator.device, multi_avg_fn=_warming_average(training.ema)
        )
        optimizer = torch.optim.AdamW(
            self.net.parameters(), training.learning_rate, weight_decay=training.weight_decay
        )
        schedule = OneCycleLR(optimizer, training.learning_rate, total_steps=training.steps)
        loader = DataLoader(
            digits, training.batch, shuffle=True, drop_last=True, collate_fn=lambda batch: batch
        )
        self.model, self.optimizer, self.schedule, self.loader = accelerator.prepare(
            self.net, optimizer, schedule, loader
        )
        self.done = 0

    @property
    def averaged(self) -> DigitNet:
        net = self.average.module.eval()
        assert isinstance(net, DigitNet)
        return net

    def save(self) -> None:
        self.folder.save(self.averaged, self.config, self.done)

    def run(self, console: Console) -> None:
        training, started = self.config.training, time.monotonic()
        losses: list[float] = []
        main = self.accelerator.is_main_process
        with (
            track(training.steps, console if main else Console(quiet=True)) as tracker,
            self.folder.log.open("a", encoding="utf-8") as log,
        ):
            for images, labels in islice(_forever(self.loader), training.steps):
                rate = self.schedule.get_last_lr()[0]
                loss, norm = self.step(images, labels)
                self.done += 1
                losses.append(loss)
                tracker.step(self.done, loss)
                last = self.done == training.steps
                if main and (last or self.done % training.log_every == 0):
                    line = {
                        "step": self.done,
                        "loss": fmean(losses),
                        "gradient_norm": norm,
                        "learning_rate": rate,
                        "seconds": round(time.monotonic() - started, 3),
                    }
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    losses.clear()
                if main and (last or self.done % training.checkpoint_every == 0):
                    self.save()

    def step(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """One optimiser step; returns the loss and the gradient's norm before clipping."""
        self.optimizer.zero_grad()
        loss = flow_loss(self.model, images, labels)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.net.parameters(), self.config.training.clip)
        value = float(self.accelerator.reduce(loss.detach(), "mean"))
        if not math.isfinite(value) or not math.isfinite(norm):
            raise DivergedError(self._diverged(value))
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.net)
        return value, float(norm)

    def _diverged(self, loss: float) -> str:
        what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        kept = self.done - self.done % self.config.training.checkpoint_every
        checkpoint = (
            f"the checkpoint of step {kept} is kept in {self.folder.checkpoint}"
            if kept
            else "no checkpoint was written yet"
        )
        return (
            f"training stopped at step {self.done + 1}: {what}; {checkpoint}; "
            f"a smaller training.learning_rate than {self.config.training.learning_rate} may help"
        )


def _forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _warming_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential average that forgets faster in the first steps."""

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        seen = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + seen) / (10 + seen)))

    return update
