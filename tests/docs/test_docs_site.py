"""The site builds without a warning, needs no other server, and shows every public name."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import condmod
from condmod import testing

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "first_plugin"


def test_the_site_builds_strictly_offline_and_shows_every_public_name(tmp_path):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    missing = [name for name in public_names() if f'id="{name}"' not in api]
    assert not missing, f"docs/api.md does not show {missing}"

    pages = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    assert len(pages) > 25
    for page, text in pages.items():
        loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*"(https?:[^"]*)"', text)
        assert not loaded, f"{page} loads {loaded} from elsewhere"
        assert not re.search(r"<!-- \w+: .* -->", text), f"{page} has an unexpanded marker"

    for page, text in pages.items():
        links = re.findall(r'href="([^"#?:]+)(?:#[^"]*)?"', text)
        lost = [link for link in links if not (page.parent / link).exists()]
        assert page.name == "404.html" or not lost, f"{page} leads nowhere by {lost}"


def test_the_tutorial_includes_every_file_of_its_example():
    page = (ROOT / "docs" / "first-plugin.md").read_text(encoding="utf-8")
    for file in EXAMPLE.iterdir():
        if file.is_file():
            assert f"--8<--\n{file.relative_to(ROOT)}\n--8<--" in page, f"{file.name} is not shown"


def public_names():
    """Dotted names of what `condmod`, the rooms that it offers and `condmod.testing` hold."""
    for name in set(condmod.__all__) - {"__version__"}:
        value = getattr(condmod, name)
        if inspect.ismodule(value):
            yield from (f"condmod.{name}.{inner}" for inner in made_in(value))
        else:
            yield f"condmod.{name}"
    yield from (f"condmod.testing.{name}" for name in testing.__all__)


def made_in(module):
    for name, value in vars(module).items():
        made = inspect.isroutine(value) or inspect.isclass(value)
        if made and value.__module__.startswith(module.__name__) and not name.startswith("_"):
            yield name
