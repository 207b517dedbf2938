"""Third-party plugins for the core's tests: real distributions, built and installed offline."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from condmod import Registry

FIXTURES = Path(__file__).parents[1] / "fixtures"
BUILD = """
import os, pathlib, sys
from hatchling.build import build_wheel

for project in sys.argv[2:]:
    os.chdir(project)
    build_wheel(sys.argv[1])
"""


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel of every project in tests/fixtures, by the project's name."""
    folder = tmp_path_factory.mktemp("wheels")
    projects = sorted(path.parent for path in FIXTURES.glob("*/pyproject.toml"))
    subprocess.run([sys.executable, "-c", BUILD, folder, *projects], check=True)
    built = {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in folder.glob("*.whl")}
    assert sorted(built) == [project.name for project in projects]
    return built


@pytest.fixture(scope="session")
def targets(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per project with its wheel installed: what is pure Python is only unpacked."""
    folders = {}
    for name, wheel in wheels.items():
        folders[name] = tmp_path_factory.mktemp(name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folders[name])
    return folders


@pytest.fixture
def installed(
    targets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Registry]]:
    """Make projects of tests/fixtures importable, and give a fresh registry that sees them."""

    def install(*names: str) -> Registry:
        for name in names:
            monkeypatch.syspath_prepend(str(targets[name]))
        return Registry()

    yield install
    for target in targets:
        sys.modules.pop(target.replace("-", "_"), None)


@pytest.fixture
def python(targets: dict[str, Path]) -> Callable[..., str]:
    """Run code in a fresh Python that has projects installed; gives what it printed."""

    def run(code: str, *names: str, **environment: str) -> str:
        path = os.pathsep.join(str(targets[name]) for name in names)
        finished = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return run
