"""The commands `demo`, `train` and `sample`; everything heavy is imported as one of them runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from condmod_lab.config import TrainConfig

_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field, as in training.steps=500."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a former run.")]
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
    _run(config, overwrite=overwrite or config.output == _DEMO_FOLDER, as_json=json)


def train(
    config: Annotated[Path, typer.Argument(help="YAML file.", show_default=False)],
    set_: _Set = None,
    output: _Output = None,
    overwrite: _Overwrite = False,
    json: _Json = False,
) -> None:
    """Train, sample and measure what a YAML file describes.

    Example:
        condmod train examples/digits.yaml --set modulator=film
    """
    from condmod_lab.config import load_config

    overrides = list(set_ or ())
    if output is not None:
        overrides.append(f"output={dumps(output)}")
    _run(load_config(config, overrides), overwrite=overwrite, as_json=json)


def sample(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    label: Annotated[int, typer.Option(help="The digit to draw, from 0 to 9.")],
    count: Annotated[int, typer.Option(min=1, max=10_000, help="How many to draw.")] = 20,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Decides the noise.")] = 0,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="In place of the run's own guidance.")
    ] = None,
    json: _Json = False,
) -> None:
    """Draw digits of one class with a trained network.

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
                "label": label,
                "count": count,
                "picture": str(drawn.picture),
                "tensors": str(drawn.tensors),
                "read_as_label": drawn.read_as_label,
            }
        )
    else:
        typer.echo(
            f"drew {count} digit{'s' * (count != 1)} of class {label}; the classifier reads "
            f"{drawn.read_as_label:.1%} of them as {label}\n"
            f"  picture  {drawn.picture}\n  tensors  {drawn.tensors}"
        )


def _run(config: TrainConfig, *, overwrite: bool, as_json: bool) -> None:
    from rich.console import Console

    from condmod_lab import workflow

    with _memory():
        metrics = workflow.run(config, Console(stderr=True), overwrite=overwrite)
    if not metrics:
        return
    if as_json:
        _print_json({"output": config.output, **metrics})
    else:
        typer.echo(_summary(metrics, config.output))


@contextmanager
def _memory() -> Iterator[None]:
    """Tell that the machine has too little memory as a user's error."""
    from condmod_lab.errors import OutOfMemoryError

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise OutOfMemoryError(
            "not enough memory for this run; lower backbone.channels, training.batch, "
            f"sampling.samples or the modulator's hidden widths ({str(error).splitlines()[0]:.100})"
        ) from None


def _summary(metrics: dict[str, Any], output: str) -> str:
    from condmod_lab.metrics import GOALS, missed_goals

    missed = missed_goals(metrics)
    lines = [
        f"{metrics['num_samples']} digits drawn by {metrics['parameters']:,} parameters, "
        f"conditioned by {metrics['modulator']}"
    ]
    for name, (low, high) in GOALS.items():
        goal = f">= {low}" if high == float("inf") else f"{low} to {high}"
        reached = "missed" if name in missed else "reached"
        lines.append(f"  {name:<21} {metrics[name]:.3f}   goal {goal:<11} {reached}")
    lines += [
        f"  {'recall':<21} {metrics['recall']:.3f}",
        f"  {'null_accuracy':<21} {metrics['null_accuracy']:.3f}   chance is 0.1",
        f"  {'classifier_accuracy':<21} {metrics['classifier_accuracy']:.3f}   on held-out digits",
        f"trained in {metrics['train_seconds']} s, drew in {metrics['sample_seconds']} s",
        f"look at {output}/samples.png and {output}/loss.png",
    ]
    return "\n".join(lines)


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(dumps(document, indent=2))
