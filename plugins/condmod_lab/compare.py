"""A comparison: one run per spec and seed, of equal budget, data, order and draws."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from condmod import CondmodError, SiteError, configure
from condmod_lab import comparison_report, folders, journal
from condmod_lab.comparison_folder import ComparisonFolder, shared
from condmod_lab.config import TrainConfig, make_config
from condmod_lab.data import Split, load_data
from condmod_lab.errors import ConfigError, RunFolderError
from condmod_lab.launch import make_accelerator
from condmod_lab.network import build
from condmod_lab.paired import FIGURES, summarise
from condmod_lab.progress import tell
from condmod_lab.run_folder import DataFacts, Into, RunFolder, facts_of
from condmod_lab.stopping import Terminating
from condmod_lab.workflow import prepare, run, tell_skipped
from condmod_lab.writing import save_json, writing

_COLUMNS: Final = 8
_LAUNCHED: Final = ("WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_POINTS: Final = 200


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of a comparison."""

    spec: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        return f"{self.spec} seed {self.seed}"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.output))


def compare(
    specs: Sequence[str],
    config: TrainConfig,
    seeds: Sequence[int],
    console: Console,
    *,
    command: str,
    jobs: int = 1,
    into: Into = "new",
) -> dict[str, Any]:
    """Train every spec on every seed, compare them pair by pair, and leave a report.

    Args:
        specs: the modulators, two or more.
        config: what all runs share; its `output` is the comparison's folder.
        seeds: one or more.
        console: where progress goes.
        command: the command line, for the report.
        jobs: how many runs go side by side, each in a process of its own.
        into: what may happen to a former comparison in the folder. One that goes on keeps its
            finished runs, and may have more specs and seeds than before.

    Returns:
        What results.json holds.

    Raises:
        ConfigError: fewer than two specs, two that are the same, no seeds.
        SiteError: specs that do not fit the network; says each one's place and why.
        RunFolderError: the folder cannot be written, or holds something already.
        CondmodError: what else is wrong with the config or its data.
    """
    if launched := [name for name in _LAUNCHED if os.environ.get(name, "1") != "1"]:
        raise ConfigError(
            "a comparison is one process that starts its runs itself; use --jobs, and where a "
            f"scheduler has left {' and '.join(launched)} in the environment, unset it"
        )
    names = _check_specs(specs)
    if not seeds:
        raise ConfigError("a comparison takes one seed or more, as in --seeds 3; got none")
    folder, split = ComparisonFolder(Path(config.output)), load_data(config.data)
    config = prepare(config, split)
    make_accelerator(config, folder.path)  # tells what this machine cannot do
    folder.check(names, seeds, config, into)
    runs = [
        _Run(name, seed, _of_run(config, name, seed, folder)) for seed in seeds for name in names
    ]
    _check_fit(runs[: len(names)], split)
    tell_skipped(console, split)
    with folders.lock(folder.path):
        folder.claim(names, seeds, config, into)
        failed = _carry_out(runs, facts_of(split), jobs, console)
        if len(failed) == len(runs):
            raise RunFolderError(
                f"all {len(runs)} runs in {folder.path} failed, the first of them with: "
                f"{next(iter(failed.values()))}"
            )
        document = {
            "specs": names,
            "seeds": list(seeds),
            "command": command,
            "config": shared(config).model_dump(mode="json"),
            "machine": _machine(jobs),
            "failed": failed,
            "skipped": list(split.skipped),
            **_measured(names, seeds, runs),
        }
        _write(document, folder, runs, split)
    return document


def _check_specs(specs: Sequence[str]) -> list[str]:
    """The specs in their shortest form.

    Raises:
        SpecError: one of them is wrong.
        ConfigError: there are fewer than two, or two are the same.
    """
    if len(specs) < 2:
        raise ConfigError(
            "a comparison takes two specs or more, as in condmod compare film none; "
            f"got {', '.join(specs) or 'none'}"
        )
    given: dict[str, str] = {}
    for spec in specs:
        name = str(configure(spec, role="modulator"))
        if name in given:
            raise ConfigError(f"{given[name]} and {spec} are the same modulator; leave one out")
        given[name] = spec
    return list(given)


def _of_run(config: TrainConfig, spec: str, seed: int, folder: ComparisonFolder) -> TrainConfig:
    return make_config(
        {
            **config.model_dump(mode="json"),
            "modulator": spec,
            "seed": seed,
            "output": str(folder.run(spec, seed).path),
        }
    )


def _check_fit(runs: Sequence[_Run], split: Split) -> None:
    """Build each network once, so that all misfits show before anything is trained."""
    misfits = []
    for one in runs:
        try:
            build(one.config, len(split.classes), split.shape)
        except CondmodError as error:
            misfits.append(f"  {one.spec}: {error}")
    if misfits:
        raise SiteError(
            f"{len(misfits)} of {len(runs)} specs cannot be compared; leave them out or mend "
            "them:\n" + "\n".join(misfits)
        )


def _carry_out(
    runs: Sequence[_Run], facts: DataFacts, jobs: int, console: Console
) -> dict[str, str]:
    """Carry out what is not finished; gives why runs failed, by their names.

    Raises:
        RunFolderError: a process was killed, and its run can go on; or a finished run is of other
            data.
    """
    waiting = []
    for one in runs:
        if one.folder.metrics():
            one.folder.resume(one.config, facts)  # of this data still?
        else:
            waiting.append(one)
    done, failed, threads = len(runs) - len(waiting), dict[str, str](), _threads(jobs)
    if done:
        console.print(f"{done} of {len(runs)} runs are finished already")
    with Terminating(), parallel_config(backend="loky", inner_max_num_threads=threads):
        try:
            results = Parallel(n_jobs=jobs, return_as="generator_unordered")(
                delayed(_one)(one, threads if jobs > 1 else None) for one in waiting
            )
            for one, metrics, error in results:
                done += 1
                if error:
                    failed[one.name] = error
                tell(console, f"[{done}/{len(runs)}] {one.name}: " + (error or _short(metrics)))
        except KeyboardInterrupt:
            if jobs > 1:
                get_reusable_executor().shutdown(kill_workers=True)  # who would train on alone
            finished = f"{done - len(failed)} of {len(runs)} runs are finished"
            tell(console, f"interrupted: {finished}; go on with --resume")
            raise
        except BrokenProcessPool:
            raise RunFolderError(
                "the process of a run was killed, as happens where memory runs out; "
                f"{done - len(failed)} of {len(runs)} runs are finished; go on with --resume, "
                "perhaps with fewer --jobs"
            ) from None
    return failed


def _threads(jobs: int) -> int:
    """An equal share of the cores for each of several runs."""
    return max(1, int(cpu_count()) // jobs)


def _one(one: _Run, threads: int | None) -> tuple[_Run, dict[str, Any], str]:
    """Carry out a run; its metrics, or why it failed."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return one, run(one.config, Console(quiet=True), into="resume"), ""
    except CondmodError as error:
        return one, {}, str(error)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a mistake in one spec is not the others'
        return one, {}, f"{type(error).__name__}: {error}"


def _short(metrics: Mapping[str, Any]) -> str:
    return (
        f"held-out loss {metrics['held_out_loss']:.4f}, accuracy "
        f"{metrics['conditional_accuracy']:.3f}, {metrics['train_seconds']} s of training"
    )


def _machine(jobs: int) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "cpus": cpu_count(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "jobs": jobs,
        "threads": torch.get_num_threads() if jobs == 1 else _threads(jobs),
    }


def _measured(specs: Sequence[str], seeds: Sequence[int], runs: Sequence[_Run]) -> dict[str, Any]:
    """What the runs have come to; NaN where one of them failed."""
    found = {(one.spec, one.seed): one.folder for one in runs}
    items: dict[str, dict[str, Tensor]] = {spec: {} for spec in specs}
    costs: dict[str, dict[str, list[float]]] = {spec: {} for spec in specs}
    metrics = {place: folder.metrics() for place, folder in found.items()}
    tables = {
        place: _read(folder, "measures.safetensors") if metrics[place] else {}
        for place, folder in found.items()
    }
    whole = next(table for table in tables.values() if table)
    for spec in specs:
        for figure in FIGURES:
            if figure.reduce is None:
                costs[spec][figure.name] = [
                    _figure(found[spec, seed], metrics[spec, seed], figure.name) for seed in seeds
                ]
            else:
                lost = torch.full_like(whole[figure.name].float(), float("nan"))
                items[spec][figure.name] = torch.stack(
                    [
                        _figure(found[spec, seed], tables[spec, seed], figure.name, lost).float()
                        for seed in seeds
                    ]
                )
    return {
        **summarise(specs, seeds, items, costs),
        "curves": {spec: _curve([found[spec, seed] for seed in seeds]) for spec in specs},
    }


def _figure(folder: RunFolder, held: Mapping[str, Any], name: str, lost: Any = math.nan) -> Any:
    """A figure of a run; what stands for it where the run failed and holds nothing."""
    if not held:
        return lost
    if name not in held:
        raise RunFolderError(
            f"{folder.path} lacks the figure {name}; remove {folder.figures} and go on with "
            "--resume"
        )
    return held[name]


def _read(folder: RunFolder, name: str) -> dict[str, Tensor]:
    """Tensors of a finished run."""
    path = folder.path / name
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(
            f"{path} cannot be read ({error}); remove {folder.figures} and go on with --resume"
        ) from None


def _curve(runs: Sequence[RunFolder]) -> dict[str, list[float]]:
    """The loss over the steps: mean, least and most over the seeds, at 200 points or fewer."""
    losses: dict[int, list[float]] = {}
    for folder in runs:
        for line in journal.read(folder.log):
            losses.setdefault(line["step"], []).append(line["loss"])
    shown = sorted(losses)[:: -(-len(losses) // _POINTS) or 1]
    return {
        "step": [float(step) for step in shown],
        "loss": [fmean(losses[step]) for step in shown],
        "low": [min(losses[step]) for step in shown],
        "high": [max(losses[step]) for step in shown],
    }


def _write(
    document: dict[str, Any], folder: ComparisonFolder, runs: Sequence[_Run], split: Split
) -> None:
    """Write results, tables, picture and report."""
    classes = range(len(split.classes))
    grids = {}
    for one in runs:
        if one.spec not in grids and one.folder.metrics():
            drawn = _read(one.folder, "samples.safetensors")
            grids[one.spec] = _grid(drawn["images"], drawn["labels"], classes)
    real = _grid(split.held_out.images, split.held_out.labels, classes)
    save_json(folder.result("results.json"), document)
    with writing(folder.path):
        comparison_report.write_csv(document, folder.result("table.csv"))
        comparison_report.write_pairs_csv(document, folder.result("pairs.csv"))
        comparison_report.draw_comparison(document, folder.result("comparison.png"))
        comparison_report.write_html(
            document, grids, folder.result("report.html"), real=real, ink=split.ink
        )


def _grid(images: Tensor, labels: Tensor, classes: range) -> Tensor:
    """The first images of each class, (rows, columns, C, H, W)."""
    columns = min(_COLUMNS, int(torch.bincount(labels, minlength=len(classes)).min()))
    return torch.stack([images[labels == label][:columns] for label in classes])
