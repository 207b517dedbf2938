"""The public door: what `condmod` offers, that it opens late, and that its stub says the same."""

import ast
import importlib
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

import condmod

ROOT = Path(condmod.__file__).parent
STUB = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8"))


def test_what_is_public_is_sorted_and_all_of_it_is_there():
    assert condmod.__all__ == sorted(set(condmod.__all__))
    assert dir(condmod) == condmod.__all__
    for name in condmod.__all__:
        assert getattr(condmod, name) is not None


def test_a_star_import_gives_all_of_it():
    namespace: dict[str, object] = {}
    exec("from condmod import *", namespace)
    assert set(condmod.__all__) <= namespace.keys()


def test_what_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError) as caught:
        _ = condmod.moduletor
    assert str(caught.value) == "module 'condmod' has no attribute 'moduletor'"


def test_the_stub_lists_what_is_public():
    listed = [
        ast.literal_eval(node.value)
        for node in STUB.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "__all__"
    ]
    assert [sorted(names) for names in listed] == [condmod.__all__]


def test_the_stub_imports_every_public_name_from_where_it_lives():
    given: dict[str, object] = {}
    for node in STUB.body:
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            for alias in node.names:
                module = importlib.import_module(node.module)
                given[alias.name] = getattr(module, alias.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            given[node.target.id] = condmod.__version__
    assert sorted(given) == condmod.__all__
    for name, value in given.items():
        assert getattr(condmod, name) is value


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "py.typed").is_file()


def test_the_version_is_that_of_the_distribution():
    assert condmod.__version__ == metadata.version("condmod")


def test_every_public_function_and_class_has_a_docstring():
    bare = [
        name
        for name in condmod.__all__
        if isinstance(getattr(condmod, name), type | types.FunctionType | types.ModuleType)
        and not getattr(condmod, name).__doc__
    ]
    assert bare == []


LAZY = {
    "the import": ("", {"torch", "pydantic", "pluggy", "yaml", "einops", "safetensors"}),
    "parsing": ("condmod.parse('film(a=1)')", {"torch", "pydantic", "pluggy"}),
    "errors": ("condmod.SpecError", {"torch", "pydantic", "pluggy"}),
    "listing modulators": ("condmod.list_modulators()", {"torch", "condmod_film"}),
    "listing encoders": ("condmod.list_encoders('*', exclude='f*')", {"torch", "condmod_fusion"}),
    "an unknown name": (
        "import contextlib\nwith contextlib.suppress(LookupError): condmod.configure('flim')",
        {"torch", "condmod_film"},
    ),
    "a config base": ("condmod.ModulatorConfig, condmod.ModulatorSpec", {"torch"}),
    "a hook": ("condmod.hookimpl", {"torch", "pydantic"}),
    "a registry": ("repr(condmod.Registry())", {"torch", "condmod_film"}),
}


@pytest.mark.parametrize(("code", "heavy"), LAZY.values(), ids=LAZY)
def test_nothing_heavy_is_imported_before_it_is_used(
    python: Callable[..., str], code: str, heavy: set[str]
):
    printed = python(f"import sys, condmod\n{code}\nprint(sorted({heavy!r} & set(sys.modules)))")
    assert printed == "[]\n"


ERRORS = {
    "BackendError": RuntimeError,
    "SpecError": ValueError,
    "UnknownNameError": LookupError,
    "SiteError": ValueError,
    "ShapeError": ValueError,
    "ConditionError": ValueError,
    "DefinitionError": TypeError,
    "FoldError": ValueError,
    "PluginError": ImportError,
    "PluginConflictError": ImportError,
    "CheckpointError": ValueError,
    "CodecError": ValueError,
}


def test_every_error_stands_in_one_tree_and_is_also_a_builtin():
    public = {name for name in condmod.__all__ if name.endswith("Error")}
    assert public == {*ERRORS, "CondmodError"}
    for name, builtin in ERRORS.items():
        assert issubclass(getattr(condmod, name), condmod.CondmodError)
        assert issubclass(getattr(condmod, name), builtin)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import plugins.condmod_film", "an editable install makes plugins.x a second copy of x"),
        ("from plugins import condmod_film", "an editable install makes plugins.x a second copy"),
        ("import tests.core", "tests are no package"),
    ],
)
def test_the_linter_refuses_a_second_copy_of_a_plugin_and_tests_as_a_package(code: str, told: str):
    lint = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--stdin-filename", "condmod/example.py", "-"],
        input=f'"""A module."""\n\n{code}\n',
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert lint.returncode == 1
    assert "TID251" in lint.stdout
    assert told in lint.stdout


def test_a_notebook_shows_tables():
    film = condmod.describe("film")._repr_html_()
    assert film.startswith("<h4>film</h4><p>FiLM: y = γ(c)·x + β(c)")
    assert "<td>scale</td><td>&#x27;raw&#x27; |" in film
    registry = condmod.Registry()._repr_html_()
    assert registry.startswith("<table><thead><tr><th>name</th><th>role</th><th>from</th></tr>")
    assert "<tr><td>timestep</td><td>encoder</td><td>condmod " in registry
    plan = condmod.plan(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"0": "film"}, condition_dim=3)
    assert plan._repr_html_().startswith("<pre>site  module  spec")
