"""The commands of the lab; everything heavy is imported as one of them runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from condmod_lab.config import TrainConfig
    from condmod_lab.run_folder import Into

_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field, as in training.steps=500."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a former run.")]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a run that was stopped, or begin it.")
]
_Output = Annotated[str | None, typer.Option(help="Run folder, in place of the config's.")]
_DEMO_FOLDER = "runs/demo"


def demo(
    modulator: Annotated[
        str, typer.Option(help="Spec of the modulator in every block.")
    ] = "dense_film",
    seed: Annotated[int, typer.Option(help="Decides every random draw.")] = 0,
    set_: _Set = None,
    output: Annotated[
        str, typer.Option(help="Run folder; a former demo in runs/demo is replaced.")
    ] = _DEMO_FOLDER,
    overwrite: _Overwrite = False,
    resume: _Resume = False,
    json: _Json = False,
) -> None:
    """Learn to draw handwritten digits on demand, in about two minutes on two cores.

    Trains a small network on the 1,797 real digits that scikit-learn ships,
    conditioned on class and time by the modulator that you name, draws 1,000
    digits, measures them, and leaves figures and pictures in the run folder.

    Example:
        condmod demo --modulator "dense_film"
    """
    from condmod_lab.config import make_config

    document = {"modulator": modulator, "seed": seed, "output": output}
    config = make_config(document, set_ or ())
    own = config.output == _DEMO_FOLDER and not resume
    _run(config, _into(overwrite=overwrite or own, resume=resume), as_json=json)


def train(
    config: Annotated[Path, typer.Argument(help="YAML file.", show_default=False)],
    set_: _Set = None,
    output: _Output = None,
    overwrite: _Overwrite = False,
    resume: _Resume = False,
    json: _Json = False,
) -> None:
    """Train, sample and measure what a YAML file describes.

    On several processes or machines, launch it as any script:
    `accelerate launch -m condmod train FILE` or `torchrun ... -m condmod train FILE`.

    Example:
        condmod train examples/digits.yaml --set modulator=film
    """
    from condmod_lab.config import load_config

    overrides = list(set_ or ())
    if output is not None:
        overrides.append(f"output={dumps(output)}")
    into = _into(overwrite=overwrite, resume=resume)
    _run(load_config(config, overrides), into, as_json=json)


def compare(
    specs: Annotated[
        list[str], typer.Argument(help="Specs of modulators, two or more.", show_default=False)
    ],
    seeds: Annotated[int, typer.Option(min=0, help="Runs of each spec, from seed 0 on.")] = 3,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of what all runs share.", show_default=False)
    ] = None,
    set_: _Set = None,
    output: Annotated[str, typer.Option(help="Folder of the comparison.")] = "runs/compare",
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a former comparison.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with a comparison, also with more specs or seeds than before."
        ),
    ] = False,
    json: _Json = False,
) -> None:
    """Train several specs on several seeds, and tell which differences are real.

    Every run has the same budget, data, order and random draws. Prints a table,
    and leaves it as CSV, PNG and a report.html of one file in the folder.

    Example:
        condmod compare film dense_film adaln_zero "film(scale='one_plus')" none --seeds 3
    """
    from rich.console import Console

    from condmod_lab.comparison_report import print_table
    from condmod_lab.config import load_config, make_config

    own = {"modulator": "the specs", "seed": "--seeds", "output": "--output"}
    for override in set_ or ():
        if (key := override.partition("=")[0]) in own:
            raise typer.BadParameter(f"--set {key}: a comparison takes {own[key]} instead")
    overrides = [*(set_ or ()), f"output={dumps(output)}"]
    shared = load_config(config, overrides) if config else make_config({}, overrides)
    with _memory():
        from condmod_lab.compare import compare as run

        document = run(
            specs,
            shared,
            range(seeds),
            Console(stderr=True),
            command=_command(),
            jobs=jobs,
            into=_into(overwrite=overwrite, resume=resume),
        )
    if json:
        _print_json({"output": output, **document})
    else:
        print_table(document, Console())
        typer.echo(f"look at {output}/report.html")
    if document["failed"]:
        raise SystemExit(1)


def sample(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    label: Annotated[str, typer.Option(help="The class to draw, by name.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, max=10_000, help="How many to draw.")] = 20,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Decides the noise.")] = 0,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="In place of the run's own guidance.")
    ] = None,
    json: _Json = False,
) -> None:
    """Draw images of one class with a trained network.

    Example:
        condmod sample runs/demo --label 3
    """
    from condmod_lab import workflow
    from condmod_lab.run_folder import RunFolder

    with _memory():
        drawn = workflow.sample(RunFolder(run), label, count=count, seed=seed, guidance=guidance)
    if json:
        _print_json(
            {
                "label": drawn.label,
                "count": count,
                "picture": str(drawn.picture),
                "tensors": str(drawn.tensors),
                "read_as_label": drawn.read_as_label,
            }
        )
    else:
        typer.echo(
            f"drew {count} image{'s' * (count != 1)} of class {drawn.label}; "
            + (
                "the data of the run is gone, so no classifier has read them"
                if drawn.read_as_label is None
                else f"the classifier reads {drawn.read_as_label:.1%} of them as {drawn.label}"
            )
            + f"\n  picture  {drawn.picture}\n  tensors  {drawn.tensors}"
        )


def _command() -> str:
    """The command line that makes the same from nothing."""
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite", "--json")]
    return " ".join(["condmod", *map(_quoted, words)])


def _quoted(word: str) -> str:
    """A word as one would type it: specs hold single quotes."""
    plain = "'" in word and not set(word) & set('"$`\\!')
    return f'"{word}"' if plain else shlex.quote(word)


def _into(*, overwrite: bool, resume: bool) -> Into:
    if overwrite and resume:
        raise typer.BadParameter("--overwrite and --resume exclude each other")
    return "overwrite" if overwrite else "resume" if resume else "new"


def _run(config: TrainConfig, into: Into, *, as_json: bool) -> None:
    from rich.console import Console

    from condmod_lab import workflow

    with _memory():
        metrics = workflow.run(config, Console(stderr=True), into=into)
    if not metrics:
        return
    if as_json:
        _print_json({"output": config.output, **metrics})
    else:
        typer.echo(_summary(metrics, config))


@contextmanager
def _memory() -> Iterator[None]:
    """Tell that the machine has too little memory as a user's error."""
    from condmod_lab.errors import OutOfMemoryError

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _out_of_memory(error):
            raise
        raise OutOfMemoryError(
            "not enough memory for this run; lower backbone.channels, training.batch, "
            f"sampling.samples or the modulator's hidden widths ({str(error).splitlines()[0]:.100})"
        ) from None


def _out_of_memory(error: RuntimeError) -> bool:
    from torch import OutOfMemoryError

    return isinstance(error, OutOfMemoryError) or "can't allocate memory" in str(error)


def _summary(metrics: dict[str, Any], config: TrainConfig) -> str:
    from condmod_lab.metrics import GOALS, missed_goals

    goals, output = GOALS if config.data.name == "digits" else {}, config.output
    missed = missed_goals(metrics)
    lines = [
        f"{metrics['num_samples']} images drawn by {metrics['parameters']:,} parameters, "
        f"conditioned by {metrics['modulator']}"
    ]
    for name, (low, high) in goals.items():
        goal = f">= {low}" if high == float("inf") else f"{low} to {high}"
        reached = "missed" if name in missed else "reached"
        lines.append(f"  {name:<21} {metrics[name]:.3f}   goal {goal:<11} {reached}")
    others = [name for name in GOALS if name not in goals]
    lines += [f"  {name:<21} {metrics[name]:.3f}" for name in (*others, "recall", "held_out_loss")]
    lines += [
        f"  {'null_accuracy':<21} {metrics['null_accuracy']:.3f}   drawn without a label",
        f"  {'classifier_accuracy':<21} {metrics['classifier_accuracy']:.3f}   on held-out images",
        f"trained in {metrics['train_seconds']} s, drew in {metrics['sample_seconds']} s",
        f"look at {output}/samples.png and {output}/loss.png",
    ]
    return "\n".join(lines)


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(dumps(document, indent=2))
