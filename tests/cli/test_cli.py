"""The command line: what it prints, its exit codes, and that listing loads no torch."""

import json
import subprocess
import sys

import pytest

CONDMOD = [sys.executable, "-c", "from condmod.cli import main; main()"]


def run(*args, **kwargs):
    return subprocess.run([*CONDMOD, *args], capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("args", [["list"], ["plugins"], ["--help"], ["list", "--json"]])
def test_listing_and_help_import_no_torch(args):
    code = (
        "import sys\nfrom condmod.cli import app\n"
        f"try: app({args!r})\nexcept SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'numpy', 'accelerate', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_list_matches_wildcards_and_leaves_out():
    done = run("list", "*film*", "--exclude", "dense*", "--json")
    assert json.loads(done.stdout) == [
        {"name": "film", "role": "modulator", "from": "condmod 0.1.0"}
    ]


def test_list_is_an_aligned_table():
    lines = run("list", "*film").stdout.splitlines()
    assert lines == [
        "name        role       from",
        "dense_film  modulator  condmod 0.1.0",
        "film        modulator  condmod 0.1.0",
    ]


def test_show_prints_equation_options_and_source():
    out = run("show", "dense_film").stdout
    for part in (
        "(1 + s)·x + t",
        "residual: boolean = False",
        "arXiv:2211.10658",
        "dense_film.py:",
    ):
        assert part in out


def test_show_json_is_for_programs():
    shown = json.loads(run("show", "film", "--json").stdout)
    assert shown["kinds"] == ["aligned", "global"]
    assert {option["name"] for option in shown["options"]} == {
        "scale",
        "init",
        "hidden",
        "activation",
    }


def test_validate_fills_in_every_option():
    done = run("validate", "film(scale='exp')", "--json")
    assert json.loads(done.stdout) == {
        "name": "film",
        "scale": "exp",
        "init": "published",
        "hidden": [],
        "activation": "silu",
    }


def test_validate_reads_a_spec_from_a_file(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("name: film\nscale: one_plus\n")
    assert json.loads(run("validate", str(path), "--json").stdout)["scale"] == "one_plus"


def test_validate_reads_the_labs_file():
    done = run("validate", "examples/digits.yaml")
    assert done.returncode == 0, done.stderr
    assert "modulator:" in done.stdout


@pytest.mark.parametrize(
    ("args", "code", "error"),
    [
        (
            ["validate", "film(scael='raw')"],
            1,
            "error: film has no option 'scael'; did you mean 'scale'?\n"
            "  film(scael='raw')\n"
            "       ^^^^^\n",
        ),
        (["show", "flim"], 1, "error: no component is called 'flim'; did you mean 'film'?\n"),
        (["schema", "flim"], 1, "error: no component is called 'flim'; did you mean 'film'?\n"),
        (
            ["validate", "nowhere.yaml"],
            1,
            "error: cannot read 'nowhere.yaml': No such file or directory\n",
        ),
    ],
)
def test_a_users_error_is_one_clear_line_and_exit_code_1(args, code, error):
    done = run(*args)
    assert (done.returncode, done.stderr) == (code, error)


def test_a_broken_yaml_file_is_a_users_error(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("name: [film\n")
    done = run("validate", str(path))
    assert done.returncode == 1
    assert done.stderr == (
        f"error: '{path}', line 2, column 1: expected ',' or ']', but got '<stream end>'\n"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [["nonsense"], ["show"], ["list", "--nonsense"]])
def test_wrong_usage_is_exit_code_2(args):
    assert run(*args).returncode == 2


@pytest.mark.parametrize(
    "command",
    ["list", "show", "validate", "schema", "doctor", "plugins", "demo", "train", "sample"],
)
def test_each_help_has_an_example(command):
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"condmod {command}" in done.stdout.split("Example")[1]


def test_schema_of_a_component_is_a_mapping_with_its_name():
    schema = json.loads(run("schema", "film").stdout)
    assert schema["properties"]["name"] == {"const": "film", "type": "string"}
    assert schema["required"] == ["name"]


def test_schema_of_everything_offers_each_component():
    schema = json.loads(run("schema").stdout)
    titles = {part["title"] for part in schema["oneOf"]}
    assert {"film", "dense_film", "fuse", "timestep"} <= titles


def test_doctor_finds_all_well():
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert not any(report["components"].values())
    assert set(report["versions"]) == {"condmod", "python", "torch", "cuda"}


def test_plugins_lists_distributions_with_what_they_bring():
    rows = json.loads(run("plugins", "--json").stdout)
    ours = next(row for row in rows if row["distribution"].startswith("condmod "))
    assert "film" in ours["components"]
    assert {"demo", "train", "sample"} == set(ours["commands"])


def test_a_command_without_its_extra_prints_the_install_line(tmp_path):
    (tmp_path / "sklearn.py").write_text("raise ModuleNotFoundError(name='sklearn')")
    done = run("demo", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin"})
    assert done.returncode == 1
    assert done.stderr == (
        "error: `condmod demo` needs sklearn; install it with: pip install 'condmod[lab]'\n"
    )
