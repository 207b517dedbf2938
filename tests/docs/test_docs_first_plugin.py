"""The plugin of the tutorial is installed as a reader would install it, and keeps every law."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from condmod.testing import MODULATOR_LAWS

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "first_plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The plugin as a real distribution in a temporary target: an environment that finds it."""
    root = tmp_path_factory.mktemp("first_plugin")
    source, target = root / "source", root / "target"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, *offline, "--target", target, source], check=True)
    (source / "acme_gate.py").unlink()  # the tests must find the installed one
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CONDMOD_", "PYTEST_"))}
    environment |= {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def run(program, *arguments):
        return subprocess.run(
            [Path(sys.executable).parent / program, *arguments],
            cwd=source,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_its_own_test_passes(installed):
    done = installed("python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{3 * len(MODULATOR_LAWS) - 6} passed, 6 skipped" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("list", "acme.*"), "acme.gate  modulator  acme-gate 0.1.0"),
        (("show", "acme.gate"), "Gate: y = σ(W·c + b)·x."),
        (("validate", "acme.gate(start=0.5)"), "name: acme.gate\nstart: 0.5"),
        (("plugins",), "acme-gate 0.1.0\n  components: acme.gate"),
    ],
)
def test_the_command_line_knows_it(installed, arguments, expected):
    done = installed("condmod", *arguments)
    assert expected in done.stdout, done.stdout + done.stderr
