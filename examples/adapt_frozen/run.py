"""A frozen reader of upright digits learns to read them at every angle: attached FiLM and others.

python examples/adapt_frozen/run.py
python examples/adapt_frozen/run.py --seeds 1 --steps 200 --output runs/quick
"""

from __future__ import annotations

import argparse
import copy
import operator
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from adaptation import (
    ANGLES,
    ATTACHED,
    FULL,
    LORA,
    LORA_TOLD,
    METHODS,
    SHOWN,
    SIZES,
    Reader,
    digits,
    make_base,
    measure,
    readings,
    score,
    slug,
)
from charts import draw_angles, draw_sizes, draw_strips

import condmod
from condmod_lab.writing import save_json, save_text

RATES = (0.003, 0.01, 0.03)
TUNED = {method.family: method for method in (FULL, LORA, LORA_TOLD, ATTACHED)}
Mapper = Callable[..., Iterable[Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, print the table, and write numbers, figures and weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many bases, each adapted anew")
    parser.add_argument("--steps", type=int, default=400, help="of training, for every method")
    parser.add_argument("--workers", type=int, default=cpu_count(), help="processes")
    parser.add_argument("--output", type=Path, default=Path("runs/adapt_frozen"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # so that the numbers are the same for any number of processes
    if given.workers == 1:
        compare(map, given.seeds, given.steps, given.output)
        return
    one_thread = partial(torch.set_num_threads, 1)
    with ProcessPoolExecutor(given.workers, get_context("spawn"), one_thread) as pool:
        compare(pool.map, given.seeds, given.steps, given.output)


def compare(run: Mapper, seeds: int, steps: int, out: Path) -> None:
    """Make the bases, choose the learning rates, adapt by every method, and tell."""
    out.mkdir(parents=True, exist_ok=True)
    bases = list(run(make_base, range(seeds), [steps] * seeds))
    print(f"{seeds} bases are trained; attached to each:\n\n{ATTACHED.plan(bases[0])}\n")

    rates = choose_rates(run, bases[0], steps)
    chosen = {name: max(tried, key=tried.__getitem__) for name, tried in rates.items()}
    print("learning rates:", ", ".join(f"{rate} for {name}" for name, rate in chosen.items()))
    chosen["nothing"] = 0.0

    methods = {m.name: m for line in (METHODS, *SIZES.values()) for m in line}
    jobs = [
        partial(
            measure,
            method,
            base,
            rate=chosen[method.family],
            steps=steps,
            seed=seed,
            folder=out / "weights" / str(seed) / slug(method),
        )
        for method in methods.values()
        for seed, base in enumerate(bases)
    ]
    print(f"adapting {len(methods)} times {seeds}")
    done = list(run(operator.call, jobs))
    found = {name: done[seeds * i : seeds * (i + 1)] for i, name in enumerate(methods)}
    results = summarise(found, rates, steps)
    check_saved(bases[0], out, found[ATTACHED.name][0]["accuracy"])

    print(f"\n{table(results)}")
    save_json(out / "results.json", results)
    save_text(out / "table.md", table(results))
    draw_angles(out / "adapt-frozen-angles.png", results)
    draw_sizes(out / "adapt-frozen-sizes.png", results)
    draw_strips(out / "adapt-frozen-strips.png", results)
    print(f"wrote {out}")


def choose_rates(run: Mapper, base: Reader, steps: int) -> dict[str, dict[float, float]]:
    """By what trains, each learning rate with its accuracy on digits kept for choosing."""
    pairs = [(method, rate) for method in TUNED.values() for rate in RATES]
    scores = run(operator.call, [partial(score, m, base, rate=r, steps=steps) for m, r in pairs])
    found: dict[str, dict[float, float]] = {}
    for (method, rate), accuracy in zip(pairs, scores, strict=True):
        found.setdefault(method.family, {})[rate] = accuracy
    return found


def check_saved(base: Reader, out: Path, accuracy: float) -> None:
    """Load the saved modulators onto the base, as a user would, and read once more."""
    folder = out / "weights" / "0" / slug(ATTACHED) / "attached"
    conditioned = condmod.load_pretrained(copy.deepcopy(base), folder).eval()
    test = digits()[2]
    read = readings(ATTACHED, conditioned, test.images)
    assert float((read == test.labels).float().mean(1).mean()) == accuracy


def summarise(
    found: dict[str, list[dict[str, Any]]], rates: dict[str, dict[float, float]], steps: int
) -> dict[str, Any]:
    """All that was found, as plain data; lists of accuracies are by seed."""
    learn, choose, test = digits()
    return {
        "steps": steps,
        "digits": {"learn": len(learn), "choose": len(choose), "test": len(test)},
        "angles": list(ANGLES),
        "rates": rates,
        "methods": {
            name: {
                **{key: runs[0][key] for key in ("parameters", "bytes")},
                "base_kept": all(run["base_kept"] for run in runs),
                **{key: [run[key] for run in runs] for key in ("accuracy", "upright")},
                "by_angle": [
                    fmean(shares) for shares in zip(*(r["by_angle"] for r in runs), strict=True)
                ],
            }
            for name, runs in found.items()
        },
        "sizes": {line: [method.name for method in methods] for line, methods in SIZES.items()},
        "shown": {"digits": SHOWN, "read": {m.name: found[m.name][0]["shown"] for m in METHODS}},
    }


def table(results: dict[str, Any]) -> str:
    """The methods of about equal size, and those they are to be compared with, as Markdown."""
    head = ("", "trained", "saved", "all angles", "upright", "base kept")
    rows = [
        (
            method.name,
            f"{found['parameters']:,}",
            f"{found['bytes'] / 1000:.0f} kB",
            mean_and_spread(found["accuracy"]),
            mean_and_spread(found["upright"]),
            "yes" if found["base_kept"] else "no",
        )
        for method in METHODS
        for found in (results["methods"][method.name],)
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = tuple("-" * widths[0] if not i else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return "".join(
        "| "
        + " | ".join(
            word.rjust(width) if place else word.ljust(width)
            for place, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |\n"
        for row in (head, rule, *rows)
    )


def mean_and_spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
