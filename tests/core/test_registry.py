"""The registry, on real third-party distributions: what is found, what fails, what is shut out."""

import inspect
import os
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import condmod
from condmod import (
    PluginConflictError,
    PluginError,
    Registry,
    Site,
    UnknownNameError,
)
from condmod.entries import Entry, installed_entries

Install = Callable[..., Registry]
GOOD = ("acme-gate", "acme-renamed")
BROKEN = (
    "broken-entry",
    "broken-exit",
    "broken-hook",
    "broken-import",
    "broken-missing",
    "broken-return",
    "broken-twice",
)


def _failed(name: str, distribution: str, module: str, reason: str) -> str:
    return (
        f"{name!r} comes from {distribution} 0.1, whose module {module} failed: {reason}; "
        "`condmod doctor` shows the traceback"
    )


FAILURES = {
    "broken.load": _failed(
        "broken.load",
        "broken-import",
        "broken_import",
        "RuntimeError: the driver is missing see the manual, page 7",
    ),
    "broken.exit": _failed("broken.exit", "broken-exit", "broken_exit", "SystemExit: 3"),
    "broken.hook": _failed(
        "broken.hook",
        "broken-hook",
        "broken_hook",
        "PluginValidationError: Plugin 'broken_hook' for hook 'condmod_modulators' hookimpl "
        "definition: condmod_modulators(registry) Argument(s) "
        "{'registry'} are declared in the hookimpl but can not be found in the hookspec",
    ),
    "broken.result": _failed(
        "broken.result",
        "broken-return",
        "broken_return",
        "DefinitionError: <class 'dict'> is no concrete Modulator or SublayerModulator with a "
        "`name`",
    ),
    "broken.nothing": (
        "broken-return 0.1 declares 'broken.nothing' in the group condmod.encoders, but its "
        "module broken_return does not provide it"
    ),
    "broken.missing": (
        "broken-missing 0.1 declares 'broken.missing' in the group condmod.modulators, but its "
        "module broken_missing does not provide it"
    ),
    "broken.twice": _failed(
        "broken.twice",
        "broken-twice",
        "broken_twice",
        "DefinitionError: 'broken.twice' is the name of both One and Two",
    ),
    "broken.hyphen": _failed(
        "broken.hyphen",
        "broken-entry",
        "broken-entry",
        "ModuleNotFoundError: No module named 'broken-entry'",
    ),
    "broken.nowhere": _failed(
        "broken.nowhere",
        "broken-entry",
        "broken_nowhere",
        "ModuleNotFoundError: No module named 'broken_nowhere'",
    ),
}


def _imported() -> set[str]:
    """Which of the projects in tests/fixtures have been imported."""
    return {name for name in sys.modules if name.startswith(("acme_", "rival_", "broken_"))}


def test_a_third_party_component_is_listed_and_built_like_a_shipped_one(installed: Install):
    registry = installed("acme-gate")
    assert registry.match("acme.*") == ["acme.embed", "acme.gate", "acme.gated", "acme.mean"]
    with registry.active():
        assert condmod.list_modulators("acme.*") == ["acme.gate", "acme.gated", "acme.mean"]
        assert condmod.list_encoders("acme.*") == ["acme.embed"]
        gate = condmod.create("acme.gate(sharpness=2)", features=4, condition_dim=3)
        embed = condmod.create_encoder("acme.embed(rows=5)", out_dim=3)
    x = torch.randn(2, 4)
    c = embed(torch.tensor([0, 4]))
    torch.testing.assert_close(gate(x, c), torch.sigmoid(2 * gate.proj(c)) * x)


def test_listing_imports_no_plugin(installed: Install):
    registry = installed(*GOOD, *BROKEN)
    assert "acme.gate" in registry
    assert len(registry) == len(list(registry)) == len(registry.names())
    assert registry.entry("acme.gate").provenance == "acme-gate 1.2.0"
    assert "distributions" in repr(registry)
    assert _imported() == set()


def test_listing_in_a_fresh_python_imports_neither_torch_nor_a_plugin(
    python: Callable[..., str],
):
    printed = python(
        "import sys, condmod\n"
        "assert 'torch' not in sys.modules\n"
        "from condmod.registry import default_registry\n"
        "names = condmod.list_modulators() + condmod.list_encoders()\n"
        "assert repr(default_registry()) and 'film' in default_registry()\n"
        "heavy = {'torch', 'condmod_film', 'acme_gate', 'broken_exit'} & set(sys.modules)\n"
        "print(sorted(heavy), 'acme.gate' in names, 'broken.exit' in names, 'film' in names)\n",
        "acme-gate",
        "broken-exit",
    )
    assert printed == "[] True True True\n"


def test_one_name_loads_one_plugin(installed: Install):
    registry = installed(*GOOD, *BROKEN)
    registry.load("acme.gate")
    assert _imported() == {"acme_gate"}
    assert registry.quarantine == {}


def test_a_module_of_several_names_and_both_roles_is_loaded_once(installed: Install):
    registry = installed("acme-gate")
    gate, embed = registry.load("acme.gate", "modulator"), registry.load("acme.embed", "encoder")
    assert registry.load("acme.gated") is gate
    assert gate.__module__ == embed.__module__ == "acme_gate"
    assert registry.load("acme.mean").__name__ == "Mean"
    assert registry.quarantine == {}


def test_what_metadata_does_not_name_is_nobody_s(installed: Install):
    registry = installed("acme-gate")
    registry.load("acme.gate")
    assert "acme.secret" not in registry
    with pytest.raises(UnknownNameError):
        registry.load("acme.secret")


def test_provenance_tells_distribution_version_file_and_line(
    installed: Install, targets: dict[str, Path]
):
    registry = installed("acme-gate")
    entry = condmod.describe("acme.gate", registry=registry).entry
    assert (entry.distribution, entry.version, entry.module) == ("acme-gate", "1.2.0", "acme_gate")
    assert Path(entry.file) == targets["acme-gate"] / "acme_gate.py"
    source = Path(entry.file).read_text().splitlines()
    assert source[entry.line - 1].startswith("class Gate(")


@pytest.mark.parametrize("name", FAILURES)
def test_who_asks_for_a_failed_name_is_told_distribution_and_reason(installed: Install, name: str):
    registry = installed("acme-gate", *BROKEN)
    for _ in range(2):
        with pytest.raises(PluginError) as caught:
            condmod.configure(name, registry=registry)
        assert str(caught.value) == FAILURES[name]
    registry.load("acme.gate")


def test_a_failed_plugin_is_kept_with_its_traceback(installed: Install):
    registry = installed("acme-gate", "broken-import")
    with pytest.raises(PluginError):
        registry.load("broken.load")
    assert list(registry.quarantine) == ["broken_import"]
    text = registry.quarantine["broken_import"]
    assert text.startswith("Traceback (most recent call last):")
    assert 'raise RuntimeError("the driver is missing' in text
    assert repr(registry).endswith(", 1 plugin failed>")


def test_a_plugin_s_other_names_work_though_one_is_missing(installed: Install):
    registry = installed("broken-missing")
    with pytest.raises(PluginError):
        registry.load("broken.missing")
    assert registry.load("broken.present").name == "broken.present"


def test_a_check_loads_everything_and_tells_what_is_wrong(installed: Install):
    registry = installed(*GOOD, *BROKEN, "rival-one", "rival-two")
    verdicts = registry.check()
    assert list(verdicts) == sorted(verdicts)
    assert {name: text for name, text in verdicts.items() if name in FAILURES} == FAILURES
    assert "is claimed by rival-one" in verdicts["rival.gate"]
    good = ("acme.gate", "acme.gated", "acme.embed", "acme.offset", "broken.present", "film")
    assert {name: verdicts[name] for name in good} == dict.fromkeys(good, "")


def test_a_plugin_that_exits_on_import_does_not_end_the_process(python: Callable[..., str]):
    printed = python(
        "import condmod\n"
        "try:\n"
        "    condmod.create('broken.exit', features=1, condition_dim=1)\n"
        "except condmod.PluginError as error:\n"
        "    print(error)\n"
        "print(condmod.create('acme.gate', features=4, condition_dim=3).name)\n",
        "acme-gate",
        "broken-exit",
    )
    assert printed == f"{FAILURES['broken.exit']}\nacme.gate\n"


def test_ctrl_c_while_a_plugin_is_imported_is_no_failure_of_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry([Entry("slow", "modulator", "interrupted", "slow", "1")])
    with pytest.raises(KeyboardInterrupt):
        registry.load("slow")
    assert registry.quarantine == {}


def test_threads_that_ask_at_once_load_a_plugin_once(installed: Install):
    registry = installed("acme-gate")
    start = threading.Barrier(8)
    loaded: list[Any] = []

    def work(name: str) -> None:
        start.wait()
        loaded.append(registry.load(name).__module__)

    names = ["acme.gate", "acme.embed"] * 4
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == ["acme_gate"] * 8
    assert registry.quarantine == {}


def test_two_distributions_with_one_name_are_told_both_and_neither_is_imported(
    installed: Install,
):
    registry = installed("rival-one", "rival-two")
    assert registry.match("rival.*") == ["rival.gate"]
    with pytest.raises(PluginConflictError) as caught:
        condmod.create("rival.gate", features=1, condition_dim=1, registry=registry)
    assert str(caught.value) == (
        "'rival.gate' is claimed by rival-one 1.0 (modulator in rival_one) and rival-two 1.0 "
        "(modulator in rival_two); uninstall one, or shut it out with "
        "CONDMOD_DISABLE=<distribution>"
    )
    assert _imported() == set()


def test_a_third_party_that_claims_a_shipped_name_is_a_conflict(installed: Install):
    registry = installed("acme-film")
    with pytest.raises(PluginConflictError, match=r"^'film' is claimed by acme-film 2\.0 .* and"):
        registry.load("film")
    assert registry.load("dense_film").name == "dense_film"
    assert "acme_film" not in sys.modules


def test_a_name_of_both_roles_is_a_conflict_and_listed_under_both():
    registry = Registry(
        [Entry("x", "modulator", "m", "one", "1"), Entry("x", "encoder", "m", "one", "1")]
    )
    assert registry.names("modulator") == registry.names("encoder") == ["x"]
    with pytest.raises(PluginConflictError) as caught:
        registry.load("x")
    assert str(caught.value) == (
        "'x' is claimed by one 1 (encoder in m) and one 1 (modulator in m); uninstall one, or "
        "shut it out with CONDMOD_DISABLE=<distribution>"
    )


@pytest.mark.parametrize("spelling", ["rival-two", "Rival_Two", " rival.two , nobody"])
def test_a_disabled_distribution_is_out_before_import(
    installed: Install, monkeypatch: pytest.MonkeyPatch, spelling: str
):
    monkeypatch.setenv("CONDMOD_DISABLE", spelling)
    registry = installed("rival-one", "rival-two", "acme-gate")
    assert registry.load("rival.gate").__module__ == "rival_one"
    assert "rival_two" not in sys.modules
    assert "acme.gate" in registry


def test_who_asks_for_a_disabled_name_is_told_why(
    installed: Install, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CONDMOD_DISABLE", "acme-gate")
    registry = installed("acme-gate")
    assert "acme.gate" not in registry
    with pytest.raises(UnknownNameError) as caught:
        registry.load("acme.gate")
    told = "'acme.gate' is provided by acme-gate 1.2.0 (shut out by CONDMOD_DISABLE)"
    assert str(caught.value) == told
    assert registry.check()["acme.gate"] == told
    assert _imported() == set()


def test_the_allow_list_lets_in_what_it_names_and_what_is_shipped(
    installed: Install, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CONDMOD_PLUGINS", "acme_gate")
    registry = installed(*GOOD)
    assert registry.load("acme.gate").name == "acme.gate"
    assert registry.load("film").name == "film"
    with pytest.raises(UnknownNameError) as caught:
        registry.load("acme.shift")
    assert str(caught.value) == (
        "'acme.shift' is provided by acme-renamed 0.3 (not among CONDMOD_PLUGINS)"
    )
    assert "acme_renamed" not in sys.modules


def test_an_empty_allow_list_leaves_what_is_shipped(
    installed: Install, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CONDMOD_PLUGINS", "")
    registry = installed(*GOOD)
    assert registry.match("acme.*") == []
    assert "film" in registry


def test_the_environment_acts_before_import_in_a_fresh_python(python: Callable[..., str]):
    code = (
        "import sys, condmod\n"
        "from condmod.registry import default_registry\n"
        "default_registry().check()\n"
        "print(sorted({'acme_gate', 'acme_renamed', 'broken_exit'} & set(sys.modules)))\n"
    )
    printed = python(
        code,
        *GOOD,
        "broken-exit",
        CONDMOD_PLUGINS="acme-gate,broken-exit",
        CONDMOD_DISABLE="broken-exit",
    )
    assert printed == "['acme_gate']\n"


def test_an_alias_is_a_name_like_any_other(installed: Install):
    registry = installed("acme-renamed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = condmod.configure("acme.move", registry=registry)
    assert config == condmod.configure("acme.shift", registry=registry)
    assert str(config) == "acme.shift"
    assert condmod.describe("acme.move", registry=registry).aliases == ("acme.move", "acme.offset")


def test_a_deprecated_name_works_and_says_what_to_use(installed: Install):
    registry = installed("acme-renamed")
    with pytest.warns(FutureWarning) as heard:
        config = condmod.configure("acme.offset", registry=registry)
    (warning,) = heard
    assert str(warning.message) == ("the component 'acme.offset' is deprecated: use 'acme.shift'")
    assert str(config) == "acme.shift"


def test_what_is_installed_after_the_scan_is_found_without_a_restart(
    installed: Install, wheels: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = installed("acme-gate")
    with pytest.raises(UnknownNameError):
        registry.load("acme.late")
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
    pip += ["--disable-pip-version-check", "--target", str(tmp_path), str(wheels["acme-late"])]
    subprocess.run(pip, check=True)
    try:
        assert registry.load("acme.late").name == "acme.late"
        assert "acme.late" in registry
    finally:
        sys.modules.pop("acme_late", None)


def test_nested_specs_are_looked_up_in_the_registry_that_was_given(installed: Install):
    registry = installed("acme-gate")
    spec = "acme.mean(inner=acme.mean(inner=acme.gate(sharpness=0.5)))"
    config = condmod.configure(spec, registry=registry)
    assert str(config) == spec
    mean = condmod.create(spec, Site(features=4, condition_dim=3), registry=registry)
    assert mean(torch.randn(2, 4), torch.randn(2, 3)).shape == (2, 4)
    with pytest.raises(UnknownNameError), Registry([]).active():
        condmod.configure("acme.gate")


UNKNOWN = {
    "a slip": ("flim", "no component is called 'flim'; did you mean 'film'?"),
    "something else": (
        "zzzzzz",
        "no component is called 'zzzzzz'; `condmod list` shows what is installed",
    ),
    "somebody's": (
        "zzzzzz.gate",
        "no component is called 'zzzzzz.gate'; if a package provides it, install that package; "
        "`condmod list` shows what is installed",
    ),
}


@pytest.mark.parametrize(("name", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_name_is_told_the_nearest_or_where_to_look(name: str, message: str):
    with pytest.raises(UnknownNameError) as caught:
        Registry().load(name)
    assert str(caught.value) == message


def test_a_name_of_the_other_role_is_told_what_there_is(installed: Install):
    registry = installed("acme-gate")
    with pytest.raises(UnknownNameError) as caught:
        registry.load("acme.gate", "encoder")
    assert str(caught.value) == (
        "'acme.gate' is a modulator, not an encoder; encoders here: "
        f"{', '.join(registry.names('encoder'))}"
    )


def _made(name: str = "my.own", qualname: str = "Own", **attributes: Any) -> type[Any]:
    """A component class as a notebook's cell defines it, anew each time the cell runs."""

    class OwnConfig(condmod.ModulatorConfig):
        """Options."""

        gain: float = 1.0

    def body(namespace: dict[str, Any]) -> None:
        namespace.update(
            name=name,
            Config=OwnConfig,
            kinds=frozenset({"global"}),
            generate=lambda self, condition: condition,
            modulate=lambda self, x, modulation: x * modulation,
            reset_parameters=lambda self: None,
            __module__="__main__",
            __qualname__=qualname,
            **attributes,
        )

    return types.new_class("Own", (condmod.Modulator,), {}, body)


def test_a_class_of_a_notebook_is_registered_and_used():
    registry = Registry([])
    own = registry.register(_made())
    assert registry.names() == ["my.own"]
    assert condmod.configure("my.own(gain=2.0)", registry=registry).component is own
    entry = registry.entry("my.own")
    assert (entry.distribution, entry.version) == ("registered in __main__", "")
    assert condmod.describe("my.own", registry=registry).options[0].name == "gain"


def test_register_is_a_decorator_of_the_active_registry():
    with Registry([]).active():

        @condmod.register
        class Decorated(_made("my.decorated")):  # type: ignore[misc]
            """A component."""

            name = "my.decorated"

            class Config(condmod.ModulatorConfig):
                """Options."""

        assert condmod.list_modulators() == ["my.decorated"]
        entry = condmod.describe("my.decorated").entry
    assert Path(entry.file) == Path(__file__)
    assert entry.line == inspect.getsourcelines(Decorated)[1]
    assert "my.decorated" not in Registry()


def test_a_cell_that_runs_again_replaces_its_class():
    registry = Registry([])
    registry.register(_made())
    again = registry.register(_made())
    assert registry.load("my.own") is again
    assert len(registry) == 1


def test_another_class_of_the_same_name_is_refused():
    registry = Registry([])
    registry.register(_made())
    with pytest.raises(PluginConflictError) as caught:
        registry.register(_made(qualname="Other"))
    assert str(caught.value) == (
        "'my.own' is already registered by __main__.Own; choose another name"
    )


def test_a_class_with_an_installed_name_is_refused_and_nothing_is_imported(installed: Install):
    registry = installed("acme-gate")
    with pytest.raises(PluginConflictError) as caught:
        registry.register(_made("acme.gate"))
    assert str(caught.value) == (
        "'acme.gate' is already provided by acme-gate 1.2.0; choose another name, with a "
        "namespace as in 'acme.gate'"
    )
    assert _imported() == set()


def test_a_registered_class_answers_to_its_aliases_and_old_names():
    registry = Registry([])
    own = registry.register(_made(aliases=("my.alias",), deprecated={"my.old": "use my.own"}))
    assert registry.names() == ["my.alias", "my.old", "my.own"]
    assert registry.load("my.alias") is own
    with pytest.warns(FutureWarning, match="the component 'my.old' is deprecated: use my.own"):
        assert registry.load("my.old") is own


def test_a_registry_reads_like_a_collection_of_names():
    registry = Registry([])
    assert repr(registry) == "<Registry: 0 components from 0 distributions>"
    assert not list(registry)
    registry.register(_made())
    assert repr(registry) == "<Registry: 1 component from 1 distribution>"
    registry.register(_made("my.second", "Second"))
    assert list(registry) == ["my.own", "my.second"]
    assert len(registry) == 2
    assert "my.own" in registry
    assert "my" not in registry
    assert 3 not in registry


ENTRIES = [
    Entry("film", "modulator", "m", "d", "1"),
    Entry("dense_film", "modulator", "m", "d", "1"),
    Entry("acme.film", "modulator", "m", "d", "1"),
    Entry("label", "encoder", "m", "d", "1"),
]
MATCHES = {
    "everything": (("*",), {}, ["acme.film", "dense_film", "film", "label"]),
    "a role": (("*", "encoder"), {}, ["label"]),
    "an ending": (("*film",), {}, ["acme.film", "dense_film", "film"]),
    "a namespace": (("acme.*",), {}, ["acme.film"]),
    "one letter": (("?ilm",), {}, ["film"]),
    "another case": (("FILM",), {}, []),
    "without one": (("*film",), {"exclude": "dense_*"}, ["acme.film", "film"]),
    "without several": (("*",), {"exclude": ["*film", "x"]}, ["label"]),
}


@pytest.mark.parametrize(("args", "kwargs", "names"), MATCHES.values(), ids=MATCHES)
def test_names_are_found_by_wildcards_less_what_is_excluded(
    args: Any, kwargs: Any, names: list[str]
):
    assert Registry(ENTRIES).match(*args, **kwargs) == names


def test_the_public_lists_take_wildcards_and_exclude():
    with Registry(ENTRIES).active():
        assert condmod.list_modulators("*film", exclude=["acme.*"]) == ["dense_film", "film"]
        assert condmod.list_encoders() == ["label"]


def test_a_distribution_that_is_half_removed_breaks_no_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "ghost-1.0.dist-info").mkdir()
    entries = tmp_path / "ghost-1.0.dist-info" / "entry_points.txt"
    entries.write_text("[condmod.modulators]\nghost.gate = ghost_gate\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry()
    assert registry.entry("ghost.gate").provenance == "unknown"
    with pytest.raises(PluginError, match="No module named 'ghost_gate'"):
        registry.load("ghost.gate")


def test_the_shipped_components_are_all_healthy():
    entries = [entry for entry in installed_entries() if entry.distribution == "condmod"]
    verdicts = Registry(entries).check()
    assert verdicts
    assert {name: text for name, text in verdicts.items() if text} == {}


def test_unknown_names_scan_again_only_when_something_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry()
    scans: list[str] = []
    entry_points = metadata.entry_points

    def counted(*, group: str) -> Any:
        scans.append(group)
        return entry_points(group=group)

    monkeypatch.setattr(metadata, "entry_points", counted)
    for _ in range(3):
        with pytest.raises(UnknownNameError):
            registry.load("nobody.gate")
    assert scans == []
    info = tmp_path / "late-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[condmod.modulators]\nlate.gate = late\n")
    os.utime(tmp_path, ns=(1, 1))  # another time, however coarse the clock
    assert registry.entry("late.gate").module == "late"
    assert scans == ["condmod.modulators", "condmod.encoders"]


def test_a_scan_never_shows_half_of_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry()
    whole, seen, stop = registry.names(), set(), threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(len(registry.names()))

    reader = threading.Thread(target=read)
    reader.start()
    for time in range(20):
        os.utime(tmp_path, ns=(time, time))
        with pytest.raises(UnknownNameError):
            registry.entry("nobody.gate")
    stop.set()
    reader.join()
    assert seen == {len(whole)}
