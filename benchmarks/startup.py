"""How long commands that import no torch take to answer; prints rows, and JSON with --json.

python benchmarks/startup.py
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date

COMMANDS = {
    "python (nothing)": ["-c", "pass"],
    "import condmod": ["-c", "import condmod"],
    "condmod --help": ["-m", "condmod", "--help"],
    "condmod list": ["-m", "condmod", "list"],
    "condmod plugins": ["-m", "condmod", "plugins"],
    "import torch": ["-c", "import torch"],
}
ROUNDS = 9


def measure() -> dict[str, list[float]]:
    """Seconds of each command in interleaved rounds, after one round to warm the disk cache."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(ROUNDS + 1):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    rows = [
        {"command": name, "median_s": statistics.median(times), "worst_s": max(times)}
        for name, times in measure().items()
    ]
    if arguments.json:
        machine = {"python": platform.python_version(), "date": date.today().isoformat()}
        print(json.dumps({**machine, "rounds": ROUNDS, "rows": rows}, indent=2))
        return
    for row in rows:
        print(f"{row['command']:<20} median {row['median_s']:.3f} s  worst {row['worst_s']:.3f} s")


if __name__ == "__main__":
    main()
