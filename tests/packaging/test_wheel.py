"""The built wheel, alone in an empty environment, holds and builds everything."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command, **kwargs):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Sdist and wheel, built from a copy of what git would ship."""
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "condmod"
    ignore = shutil.ignore_patterns(".git", ".venv", "*cache*", "runs", "site", "build", "dist")
    shutil.copytree(ROOT, source, ignore=ignore)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    return folder


@pytest.fixture(scope="module")
def python(dist, tmp_path_factory):
    """An environment that holds the wheel; its dependencies are borrowed, the sources are not."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    # a path line, not a site dir: the editable install's own .pth is not followed
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    wheel = next(dist.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", wheel)
    return interpreter


def test_twine_accepts_what_is_built(dist):
    files = sorted(dist.iterdir())
    assert [path.suffix for path in files] == [".whl", ".gz"]
    out = run(sys.executable, "-m", "twine", "check", "--strict", *files)
    assert out.count("PASSED") == 2


def test_the_wheel_lists_and_builds_every_component(python, tmp_path):
    code = """
import json, condmod, condmod_film
from pathlib import Path
from condmod import describe
assert "site-packages" in condmod.__file__ and "site-packages" in condmod_film.__file__
names = condmod.list_modulators() + condmod.list_encoders()
print(json.dumps({name: describe(name).entry.file for name in names}))
"""
    files = json.loads(run(python, "-c", code, cwd=tmp_path))
    assert len(files) == 70
    for file in files.values():
        assert not Path(file).is_relative_to(ROOT / "plugins"), f"{file} is a source, not the wheel"


def test_the_wheel_passes_the_conformance_laws(python, tmp_path):
    """Every component equals its reference; one of each kind keeps every law."""
    shutil.copytree(ROOT / "tests" / "laws", tmp_path / "laws")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    command = [python, "-m", "pytest", "-q", "laws/test_laws.py", "-p", "no:cacheprovider"]
    command += ["-k", "reference or film-last or wan-last or timestep"]
    out = run(*command, cwd=tmp_path)
    assert " passed" in out


def test_the_wheel_ships_its_types(python, tmp_path):
    code = "import condmod, pathlib; print(*pathlib.Path(condmod.__file__).parent.glob('py.typed'))"
    assert "py.typed" in run(python, "-c", code, cwd=tmp_path)
