"""The training loop, on accelerate: the same code on one CPU and on many devices."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel

from condmod import CheckpointError
from condmod.serialization import Checkpoint, load_state
from condmod_lab import journal
from condmod_lab.config import TrainConfig, flat
from condmod_lab.data import Split
from condmod_lab.errors import ConfigError, DivergedError, RunFolderError
from condmod_lab.flow import flow_errors
from condmod_lab.network import Network, build
from condmod_lab.order import Order
from condmod_lab.progress import tell, track
from condmod_lab.run_folder import Into, RunFolder, facts_of
from condmod_lab.sharding import gather, shard, whole
from condmod_lab.state import average_tensors, restore, trained, training_tensors
from condmod_lab.stopping import Stopping
from condmod_lab.writing import writing

_OVERFLOWS: Final = 25  # in a row; fp16's loss scale has then gone from 65,536 to below 0.01


def train(
    config: TrainConfig,
    split: Split,
    folder: RunFolder,
    accelerator: Accelerator,
    console: Console,
    *,
    into: Into = "new",
) -> Network:
    """Train a network and leave its checkpoint and journal in the run folder.

    Ctrl-C, SIGTERM and SIGHUP end the run after the step it is in, with a checkpoint to go on
    from. A run that goes on is, step for step, the run that was never stopped.

    Args:
        config: the run, resolved.
        split: what to learn from.
        folder: where checkpoint and journal go; claimed once the network is known to fit.
        accelerator: where to run.
        console: where progress goes, a quiet one in every process but the main one.
        into: what may happen to a former run in the folder.

    Returns:
        The network with averaged weights, in eval mode.

    Raises:
        DivergedError: the loss is not finite; says the step, and keeps the last checkpoint.
        ConfigError: there are fewer images than a batch holds.
        RunFolderError: the folder cannot be written, or holds something already.
        CondmodError: the config's modulator or encoder does not fit the network.
    """
    set_seed(config.seed)
    loop = _Loop(config, split, folder, accelerator)
    with accelerator.main_process_first():  # claimed before the others read it
        if accelerator.is_main_process:
            folder.claim(config, into)
        found = folder.resume(config, loop.facts) if into == "resume" else None
    if found is not None:
        loop.restore(found)
    if into == "resume":
        _check_same_step(loop.done, accelerator)
        if accelerator.is_main_process:
            journal.cut(folder.log, loop.done)  # all of it where no checkpoint was written
    plain = {
        key: value if isinstance(value, int | float | str) else str(value)
        for key, value in flat(config).items()
    }
    accelerator.init_trackers("condmod", config=plain)
    several = accelerator.num_processes > 1
    how = "sharded over" if loop.sharded else "on"
    where = f"{how} {accelerator.num_processes} processes " * several
    where += f"from step {loop.done} " if loop.done else ""
    tell(
        console,
        f"training {config.modulator}, {config.training.steps} steps, {where}in {folder.path}",
    )
    try:
        with Stopping() as stopping, writing(folder.path):
            loop.run(console, stopping)
            if loop.stopped:
                tell(console, _kept(loop, folder))
                accelerator.wait_for_everyone()  # a launcher that sees one go ends the others
    except RunFolderError as error:
        raise RunFolderError(f"{error}; {loop.kept}; go on with --resume") from None
    if loop.stopped or stopping.asked is not None:  # in the last step, or in its save
        stopping.go()
    return loop.averaged()


def _check_same_step(done: int, accelerator: Accelerator) -> None:
    """Refuse processes that would go on from different steps, as where folders are not shared."""
    steps = accelerator.gather(torch.tensor([done], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise RunFolderError(
            "every process goes on from the checkpoint in the run folder, so all of them must see "
            f"that folder; they found the steps {', '.join(map(str, steps))}"
        )


def _kept(loop: _Loop, folder: RunFolder) -> str:
    """Save what a stopped run has learned, and say where it is."""
    try:
        loop.save()
    except RunFolderError as error:
        return f"interrupted: the checkpoint of step {loop.done} could not be kept: {error}"
    return (
        f"interrupted: the checkpoint of step {loop.done} is in {folder.checkpoint}; "
        "go on from there with --resume"
    )


def check_batch(config: TrainConfig, split: Split) -> None:
    """Refuse a batch that no step could fill.

    Raises:
        ConfigError: there are fewer images than a batch holds.
    """
    if config.training.batch > len(split.train):
        raise ConfigError(
            f"training.batch is at most the number of images to learn from, {len(split.train)}; "
            f"got {config.training.batch}"
        )


class _Loop:
    """The parts of one run, and how many steps of it are done."""

    def __init__(
        self, config: TrainConfig, split: Split, folder: RunFolder, accelerator: Accelerator
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        training, learned = config.training, split.train
        check_batch(config, split)
        self.facts = facts_of(split)
        self.sharded = training.sharding == "fsdp2" and accelerator.num_processes > 1
        self.order = Order(
            config.seed, len(learned), training.batch, split.shape, training.label_drop
        )
        self.images = learned.images.to(accelerator.device)
        self.labels = learned.labels.to(accelerator.device)
        self.net = build(config, len(split.classes), split.shape).train()
        self.average = AveragedModel(
            self.net,
            None if self.sharded else accelerator.device,  # where a whole one may find no room
            multi_avg_fn=_warming_average(training.ema),
        )
        if self.sharded:
            mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
            for net in (self.net, self.average.module):
                assert isinstance(net, Network)
                shard(net, mesh)
        self.parameters = list(trained(self.net).values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, training.learning_rate, weight_decay=training.weight_decay
        )
        self.schedule = OneCycleLR(
            self.optimizer, training.learning_rate, total_steps=training.steps
        )
        # as if to evaluate, accelerate leaves out DDP
        self.model = accelerator.prepare_model(self.net, evaluation_mode=self.sharded)
        self.stepper, self.scheduler = accelerator.prepare(self.optimizer, self.schedule)
        self.done = 0
        self.saved = 0
        self.overflows = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.stopped = False

    def averaged(self) -> Network:
        """The network with averaged weights, in eval mode, in every process the whole of it."""
        net = self.average.module
        if self.sharded:
            net = build(self.config, len(self.facts.classes), self.facts.shape)
            load_state(net, gather(self.average.module.state_dict()))
            net.to(self.accelerator.device)
        assert isinstance(net, Network)
        return net.eval()

    @property
    def kept(self) -> str:
        """What of the run is safe, in words."""
        if self.saved:
            return f"the checkpoint of step {self.saved} is kept in {self.folder.checkpoint}"
        return "no checkpoint was written yet"

    def save(self) -> None:
        """Write a checkpoint, with parts from all processes; a finished run's is the average."""
        tensors, scaler = average_tensors(self.average), self.accelerator.scaler
        if self.done < self.config.training.steps:
            tensors |= training_tensors(self.net, self.optimizer)
        main = self.accelerator.is_main_process
        tensors = gather(tensors, keep=main)
        training = {
            "averaged": int(self.average.n_averaged),
            "losses": self.losses,
            "seconds": self.seconds,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "overflows": self.overflows,
        }
        if main:
            self.folder.save(tensors, self.config, self.facts, self.done, training)
        self.saved = self.done

    def restore(self, found: Checkpoint) -> None:
        """Go back to where a checkpoint was written.

        Raises:
            CheckpointError: the checkpoint lacks something.
        """
        steps, training = self.config.training.steps, found.document.get("training")
        try:
            done = int(found.document["step"])
            finished = done >= steps
            restore(found.tensors, self.net, self.optimizer, self.average, finished=finished)
            assert training is not None
            self.average.n_averaged.fill_(int(training["averaged"]))
            self.losses = list(map(float, training["losses"]))
            self.seconds, self.overflows = float(training["seconds"]), int(training["overflows"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(training["scaler"])
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.folder.checkpoint}: {error}; a run of another version of condmod is "
                "trained anew with --overwrite"
            ) from None
        except (AssertionError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{self.folder.checkpoint} lacks what training needs to go on: "
                f"{type(error).__name__}: {error}"
            ) from None
        self.done = self.saved = done
        taken = int(training["averaged"])  # what fp16 skipped, the schedule skipped, too
        self.schedule.load_state_dict(
            {**self.schedule.state_dict(), "last_epoch": taken - 1, "_step_count": taken + 1}
        )
        self.schedule.step()

    def run(self, console: Console, stopping: Stopping) -> None:
        """Train until the last step, or until asked to stop."""
        training = self.config.training
        before, started = self.seconds, time.monotonic()
        with track(training.steps, console) as tracker:
            tracker.start(self.done)
            while self.done < training.steps and not self.stopped:
                rate = float(self.schedule.get_last_lr()[0])
                loss, norm, self.stopped = self.step(stopping)
                self.done += 1
                self.losses.append(loss)
                self.seconds = before + time.monotonic() - started
                tracker.step(self.done, loss)
                last = self.done == training.steps
                if last or self.done % training.log_every == 0:
                    self.log(norm, rate)
                if last or self.done % training.checkpoint_every == 0:
                    self.save()

    def log(self, norm: float, rate: float) -> None:
        """Write what the last steps came to, into the journal and to the trackers."""
        line = {
            "loss": fmean(self.losses),
            "gradient_norm": norm if math.isfinite(norm) else None,
            "learning_rate": rate,
        }
        self.losses.clear()
        if self.accelerator.is_main_process:
            journal.append(
                self.folder.log, {"step": self.done, **line, "seconds": round(self.seconds, 3)}
            )
        self.accelerator.log(line, step=self.done)

    def step(self, stopping: Stopping) -> tuple[float, float, bool]:
        """One optimiser step; the loss, the gradient's norm before clipping, whether to stop."""
        accelerator, parts = self.accelerator, self.config.training.accumulate
        process = accelerator.process_index
        draws = self.order.at(self.done).part(process, accelerator.num_processes)
        self.order.seed_layers(self.done, process)
        total = torch.zeros((), device=accelerator.device)
        for place in range(parts):
            part = draws.part(place, parts)
            chosen = part.places.to(self.images.device)
            with accelerator.accumulate(self.model):
                errors = flow_errors(self.model, self.images[chosen], self.labels[chosen], part)
                loss = errors.mean()
                accelerator.backward(loss)
                total += loss.detach() / parts
        clip = self.config.training.clip
        norm = float(whole(accelerator.clip_grad_norm_(self.parameters, clip)))
        asked = torch.full_like(total, stopping.asked is not None)
        value, stop = accelerator.reduce(torch.stack([total, asked]), "mean").tolist()
        self.check(value, norm)
        self.stepper.step()
        self.scheduler.step()
        self.stepper.zero_grad()
        if not self.stepper.step_was_skipped:
            self.average.update_parameters(self.net)
        return value, norm, stop > 0

    def check(self, loss: float, norm: float) -> None:
        """Stop a run that has diverged; fp16 overflows now and then, which its scaler mends."""
        mended = self.accelerator.scaler is not None and self.overflows < _OVERFLOWS
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        if math.isfinite(loss) and (math.isfinite(norm) or mended):
            return
        what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        raise DivergedError(
            f"training stopped at step {self.done + 1}: {what}; {self.kept}; "
            f"a smaller training.learning_rate than {self.config.training.learning_rate} may help"
        )


def _warming_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential average that forgets faster in the first steps."""

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        seen = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + seen) / (10 + seen)))

    return update
