"""Every code block of the documentation does what it says.

A page's Python blocks run in order in one namespace, as a reader would run them. In `pycon` blocks
the output is compared; in `console` blocks that of `condmod` commands. Blocks titled "spec" hold
specs, one or more, with empty lines between.
"""

import doctest
import re
import shlex
import sys
import textwrap
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

import condmod
from condmod.cli import app
from condmod_lab.config import TrainConfig, make_config

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LONG = {"demo", "train", "compare", "sample"}
FLAGS = doctest.ELLIPSIS


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its title, its text, and the line that it begins at."""

    language: str
    title: str
    text: str
    line: int


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        language, _, rest = found[2].strip().partition(" ")
        title = re.search(r'title="([^"]*)"', rest)
        body = textwrap.dedent(found[3])
        if not body.startswith("--8<--"):  # a whole file, which has a test of its own
            line = text.count("\n", 0, found.start()) + 2
            yield Block(language, title[1] if title else "", body, line)


def pages_with(*languages):
    chosen = [page for page in PAGES if any(b.language in languages for b in blocks_of(page))]
    return pytest.mark.parametrize("page", chosen, ids=[str(p.relative_to(ROOT)) for p in chosen])


def test_every_block_has_a_language():
    known = {"python", "pycon", "bash", "console", "yaml", "toml", "json", "text"}
    for page in PAGES:
        for block in blocks_of(page):
            assert block.language in known, f"{page}:{block.line}: {block.language!r}"


@pages_with("python", "pycon")
def test_python_blocks_run(page, monkeypatch, tmp_path):
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    with condmod.Registry().active():
        for block in blocks_of(page):
            if block.title == "spec":
                for spec in block.text.split("\n\n"):
                    condmod.configure(spec)
            elif block.language == "python":
                _run(block, page, module.__dict__)
            elif block.language == "pycon":
                _check_session(block, page, module.__dict__)


@pages_with("bash", "console")
def test_condmod_commands_run(page, monkeypatch, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)  # where no run is in the way
    monkeypatch.setenv("COLUMNS", "100")
    for block in blocks_of(page):
        for line, output in _commands(block):
            if line.startswith("condmod "):
                _run_command(line, output, f"{page}:{block.line}")


@pages_with("yaml", "toml", "json")
def test_data_blocks_parse_and_hold_valid_specs(page):
    for block in blocks_of(page):
        if block.language == "toml":
            tomllib.loads(block.text)
        elif block.language in {"yaml", "json"}:
            document = yaml.safe_load(block.text)
            for role in ("modulator", "encoder"):
                if isinstance(document, dict) and role in document:
                    condmod.configure(document[role], role=role)
            if isinstance(document, dict) and "name" in document:
                condmod.configure(document)
            if isinstance(document, dict) and document.keys() <= TrainConfig.model_fields.keys():
                make_config(document)


@pages_with("bash", "console")
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks_of(page):
        for line, _ in _commands(block):
            if line.startswith("make "):
                assert line.split()[1] in targets, f"{page}:{block.line}: {line}"


def _commands(block):
    """Each command line of a block, with the output that a `console` block shows for it."""
    if block.language == "bash":
        return [(line, "") for line in block.text.replace("\\\n", "").splitlines()]
    sessions = re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
    parts = [session.partition("\n") for session in sessions] if block.language == "console" else []
    return [(line, output) for line, _, output in parts]


def _run(block, page, namespace):
    padded = "\n" * (block.line - 1) + block.text  # so that a traceback shows the page's line
    exec(compile(padded, str(page), "exec", dont_inherit=True), namespace)


def _check_session(block, page, namespace):
    test = doctest.DocTestParser().get_doctest(block.text, {}, page.name, str(page), block.line)
    test.globs = namespace
    report = []
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    runner.run(test, out=report.append, clear_globs=False)
    assert not runner.summarize(verbose=False).failed, "".join(report)


def _run_command(line, output, place):
    _, name, *arguments = shlex.split(line, comments=True)
    if name in LONG and not output.startswith("error:"):  # it would train: parsing it is enough
        command = typer.main.get_command(app).get_command(None, name)
        command.make_context(name, arguments)
        return
    result = CliRunner().invoke(app, [name, *arguments])
    expected = 1 if output.startswith("error:") else 0
    assert result.exit_code == expected, f"{place}: {line}\n{result.output}"
    if output:
        same = doctest.OutputChecker().check_output(output, result.output, doctest.ELLIPSIS)
        assert same, f"{place}: {line}\n{result.output}\nis not\n{output}"
