"""Writes the tables of docs/speed.md and its figure anew, from what the benchmarks have found.

python benchmarks/speed_page.py
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from measuring import met, slower

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "speed.md"
FIGURE = ROOT / "docs" / "assets" / "speed.png"
BEGIN, END = "<!-- begin {} -->\n\n", "\n\n<!-- end -->"
WAYS = ("written", "best", "compile", "condmod", "compiled condmod")
GENERATED = ("F.linear", "c @ Wt", "W @ c.T", "schedule", "table")
STEPS = ("bank", "one GEMM", "schedule", "table", "no conditioning")
Row = Mapping[str, Any]


def results() -> dict[str, Any]:
    """What was measured, by file."""
    names = ("passes", "passes-tuned", "generation")
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in names}


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """Every table of the page."""
    passes, generation = found["passes"], found["generation"]
    made = {
        "machine": machine(passes),
        "goals": goals(found),
        "losses": losses(found),
        "tuned": tuned(passes, found["passes-tuned"]),
        "kept": kept(passes["rows"]),
        "calls": calls(passes["calls"]),
        "generation": stages(generation["stages"]),
        "steps": steps(generation["steps"]),
    }
    for name in {row["pass"]: None for row in passes["rows"]}:
        made[name] = timed([row for row in passes["rows"] if row["pass"] == name])
    return made


def machine(found: Row) -> str:
    """Where and when."""
    skipped = f" No torch.compile: {found['no_compile']}." * bool(found["no_compile"])
    return (
        f"{found['cpu']}, {found['threads']} of {found['cpus']} cores, {found['capability']}, "
        f"torch {found['torch']}, Python {found['python']}, {found['date']}, "
        f"allocator: {found['allocator']}.{skipped}"
    )


def timed(rows: Iterable[Row]) -> str:
    """One mechanism: how many times faster than as written, and the share of copy's bandwidth."""
    head = [
        "Features",
        "",
        "",
        "written, ms",
        "written",
        "best",
        "compile",
        "condmod",
        "compiled condmod",
        "condmod than best eager",
        "GB/s",
        "rounds, others",
    ]
    lines = []
    for row in rows:
        ways = row["variants"]
        cells = [
            size(row),
            row["condition"],
            row["mode"],
            f"{ways['written']['ms']:.3f}",
        ]
        for way in WAYS:
            if way not in ways:
                cells.append("")
                continue
            ratio = row["faster"].get(f"{way} than written", {"ratio": 1.0})["ratio"]
            cells.append(f"{ratio:.2f} ({ways[way]['of_copy']:.0%})")
        cells += [
            told(row, "condmod than hand"),
            f"{ways['condmod']['gbps']:.1f}",
            f"{row['rounds']}, {share(row['others'])}",
        ]
        lines.append(cells)
    trap = [
        f"\n\n`addcmul` at {size(row)}, {row['mode']}: "
        f"{spread(row['faster']['addcmul than written'])} times as fast as written."
        for row in rows
        if "addcmul than written" in row["faster"]
    ]
    tuned = [
        f"\n\n`torch.compile` with max-autotune at {size(row)}, {row['mode']}: "
        f"{spread(row['faster']['max-autotune than written'])} times as fast as written."
        for row in rows
        if "max-autotune than written" in row["faster"]
    ]
    return table(head, lines, left=3) + "".join(trap + tuned)


def kept(rows: Sequence[Row]) -> str:
    """What the backward holds beyond inputs, in tensors of the features' size."""
    ways = [way for way in WAYS if way in rows[0]["variants"]]
    shown = [row for row in rows if row["mode"] == "training" and row["shape"][0] > 1]
    lines = [
        [
            f"`{row['pass']}`",
            size(row),
            row["condition"],
            *(f"{held(row, way):.2f}" for way in ways),
        ]
        for row in shown
    ]
    return table(["", "Features", "", *ways], lines, left=3)


def held(row: Row, way: str) -> float:
    """What one way keeps for its backward, in tensors of the features' size."""
    each = math.prod(row["shape"]) * (2 if row["dtype"] == "bfloat16" else 4)
    return float(row["variants"][way]["saved_mib"]) * 2**20 / each


def calls(rows: Iterable[Row]) -> str:
    """What Python costs."""
    head = [
        "",
        "Features",
        "bare function, µs",
        "written, µs",
        "compile, µs",
        "condmod, µs",
        "ratio",
    ]
    lines = [
        [
            f"`{row['pass']}`",
            str(row["shape"]),
            *(f"{row['us'][way]:.1f}" if way in row["us"] else "" for way in _CALLED),
            f"{spread(row['slower']['condmod'])}",
        ]
        for row in rows
    ]
    return table(head, lines, left=2)


_CALLED = ("bare", "written", "compile", "condmod")


def stages(rows: Iterable[Row]) -> str:
    """Generation alone."""
    lines = [
        [
            f"{row['sites']} of {row['width']}",
            str(row["batch"]),
            f"{row['weights_mib']:.0f}",
            f"{row['ms']['per site']:.3f}",
            told(row, "bank than per site"),
            *(f"{row['faster'][f'{way} than per site']['ratio']:.2f}" for way in GENERATED),
            f"{row['table_mib']:.0f}",
            f"{row['rounds']}, {share(row['others'])}",
        ]
        for row in rows
    ]
    head = ["Sites", "B", "weights, MiB", "per site, ms", "bank", *GENERATED, "table, MiB"]
    return table([*head, "rounds, others"], lines, left=1)


def steps(rows: Iterable[Row]) -> str:
    """Whole passes."""
    lines = []
    for row in rows:
        cells = [str(row["batch"]), str(row["tokens"]), row["mode"], f"{row['ms']['written']:.2f}"]
        cells += [told(row, f"{way} than written") if way in row["ms"] else "" for way in STEPS]
        lines.append([*cells, f"{row['rounds']}, {share(row['others'])}"])
    return table(["B", "tokens", "", "written, ms", *STEPS, "rounds, others"], lines, left=3)


def tuned(default: Row, other: Row) -> str:
    """The same with tensors over 32 MiB kept by the allocator."""
    found = {(row["pass"], row["mode"]): row for row in other["rows"]}
    lines = []
    for row in default["rows"]:
        same = found.get((row["pass"], row["mode"]))
        if same is None or same["shape"] != row["shape"]:
            continue
        cells = [f"`{row['pass']}`", str(row["shape"]), row["mode"]]
        for one in (row, same):
            cells.append(f"{one['variants']['written']['ms']:.1f}")
            cells.append(f"{one['variants']['condmod']['ms']:.1f}")
            cells.append(f"{one['faster']['condmod than written']['ratio']:.2f}")
        lines.append(cells)
    head = ["written, ms", "condmod, ms", "ratio"]
    return table(["", "Features", "", *head, *(f"tuned: {name}" for name in head)], lines, left=3)


def goals(found: Mapping[str, Any]) -> str:
    """Every goal at every place where it was measured."""
    lines = []
    for row in rows_of(found):
        for goal, ok in zip(row["goals"], met(row), strict=True):
            one, other = goal["of"].split(" than ")
            wanted = f"{what(row)}: {one} {goal['by']} times as fast as {other}"
            lines.append([wanted, where(row), spread(row["faster"][goal["of"]]), word(ok)])
    for row in found["passes"]["calls"]:
        ratio = row["slower"]["condmod"]
        goal = f"`{row['pass']}`, a call: at most {row['goal']} times as long as a bare function"
        ok = ratio["ratio"] <= row["goal"]
        lines.append([goal, str(row["shape"]), spread(ratio), word(ok)])
    return table(["Goal", "Where", "measured", ""], lines, left=2)


def losses(found: Mapping[str, Any]) -> str:
    """Where condmod is slower than what one can write by hand in eager torch."""
    rows = rows_of(found)
    lines = []
    for row in rows:
        for pair in OURS:
            ratio = row["faster"].get(pair)
            if ratio and slower(ratio, row["rounds"]):
                lines.append(f"- {what(row)}, {where(row)}: {spread(ratio)}")
    return "\n".join([f"It is in {len(lines)} of {len(rows)} rows:", "", *lines])


OURS = (
    "condmod than hand",
    "bank than per site",
    "bank than written",
    "schedule than written",
)


def rows_of(found: Mapping[str, Any]) -> list[Row]:
    """Every row with ratios."""
    generation = found["generation"]
    return [*found["passes"]["rows"], *generation["stages"], *generation["steps"]]


def what(row: Row) -> str:
    """What a row has measured."""
    if "pass" in row:
        return f"`{row['pass']}`, {row['mode']}"
    return f"a stack, {row['mode']}" if "tokens" in row else "generation"


def where(row: Row) -> str:
    """At which sizes."""
    if "pass" in row:
        return f"{size(row)} {row['condition']}"
    if "tokens" in row:
        return f"B={row['batch']}, {row['tokens']} tokens"
    return f"{row['sites']} sites of {row['width']}, B={row['batch']}"


def size(row: Row) -> str:
    """The features' shape, and their dtype where it is not float32."""
    return f"{row['shape']}{' bf16' * (row['dtype'] == 'bfloat16')}"


def told(row: Row, pair: str) -> str:
    """A ratio of ours, marked where it is a loss."""
    ratio = row["faster"][pair]
    lost = pair in OURS and slower(ratio, row["rounds"])
    return f"{spread(ratio)}{' **slower**' * lost}"


def word(ok: bool) -> str:
    """In a word."""
    return "met" if ok else "**missed**"


def spread(ratio: Mapping[str, float]) -> str:
    """A median with its interval."""
    return f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def share(others: float | None) -> str:
    """What other processes took."""
    return "unknown" if others is None else f"{others:.0%}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]], *, left: int) -> str:
    """Markdown; all but the first columns to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def written(page: str, made: Mapping[str, str]) -> str:
    """The page with every table in its place."""
    for name, text in made.items():
        begin = BEGIN.format(name)
        pattern = re.escape(begin) + r".*?" + re.escape(END)
        assert begin in page, name
        start, rest = re.split(pattern, page, maxsplit=1, flags=re.DOTALL)
        page = start + begin + text + END + rest
    return page


def figure(rows: Sequence[Row]) -> None:
    """How many times faster than as written, of every row in float32."""
    mpl.use("agg")
    ways = [way for way in WAYS[1:4] if way in rows[0]["variants"]]
    marks = {"best": "o", "compile": "s", "condmod": "D"}
    shown = [row for row in rows if row["dtype"] == "float32"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 6.5), sharey=True, layout="constrained")
    for axis, mode in zip(axes, ("inference", "training"), strict=True):
        own = [row for row in shown if row["mode"] == mode][::-1]
        for way in ways:
            ratios = [row["faster"][f"{way} than written"] for row in own]
            middle = [ratio["ratio"] for ratio in ratios]
            error = [
                [ratio["ratio"] - ratio["low"] for ratio in ratios],
                [ratio["high"] - ratio["ratio"] for ratio in ratios],
            ]
            axis.errorbar(
                middle, range(len(own)), xerr=error, fmt=marks[way], label=way, capsize=2, ms=5
            )
        axis.axvline(1, color="gray", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title=mode, xlabel="times as fast as hand-written code")
        axis.set_yticks(
            range(len(own)), [f"{row['pass']} {row['shape']} {row['condition']}" for row in own]
        )
        axis.grid(axis="x", alpha=0.3)
    axes[0].legend(loc="best")
    figure.savefig(FIGURE, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Write the page and the figure."""
    found = results()
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), tables(found)), encoding="utf-8")
    figure(found["passes"]["rows"])


if __name__ == "__main__":
    main()
