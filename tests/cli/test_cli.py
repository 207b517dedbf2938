"""The command line: what it prints, its exit codes, and that listing loads no torch."""

import json
import os
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
    done = run("list", "film*", "--exclude", "*_block", "--json")
    assert json.loads(done.stdout) == [
        {"name": "film", "role": "modulator", "from": "condmod 0.1.0"}
    ]


def test_list_says_when_nothing_matches():
    done = run("list", "norm")
    assert done.stdout == ""
    assert done.stderr == "nothing installed matches 'norm'; '*word*' matches inside names\n"
    assert done.returncode == 0


def test_an_alias_says_whose_other_name_it_is():
    assert "flux is another name of mmdit\n" in run("show", "flux").stdout


def test_list_is_an_aligned_table():
    lines = run("list", "f[iu]*", "--exclude", "*block").stdout.splitlines()
    assert lines == [
        "name  role       from",
        "film  modulator  condmod 0.1.0",
        "fuse  encoder    condmod 0.1.0",
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
    assert shown["kinds"] == ["aligned", "global", "rows"]
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
    [
        "list",
        "show",
        "validate",
        "schema",
        "doctor",
        "plugins",
        "demo",
        "train",
        "compare",
        "sample",
    ],
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
    assert not any(report["commands"].values())
    assert not any(report["plugins"].values())
    assert set(report["versions"]) == {"condmod", "python", "torch", "cuda"}


def test_plugins_lists_distributions_with_what_they_bring():
    rows = json.loads(run("plugins", "--json").stdout)
    ours = next(row for row in rows if row["distribution"].startswith("condmod "))
    assert "film" in ours["components"]
    assert {"demo", "train", "compare", "sample"} == set(ours["commands"])


def test_a_command_without_its_extra_prints_the_install_line(tmp_path):
    (tmp_path / "sklearn.py").write_text("raise ModuleNotFoundError(name='sklearn')")
    done = run("demo", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin"})
    assert done.returncode == 1
    assert done.stderr == (
        "error: `condmod demo` needs sklearn; install it with: pip install 'condmod[lab]'\n"
    )


def third_party(folder, name, groups, metadata=True, **modules):
    """A distribution as an installer leaves it; without METADATA, one half removed."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    if metadata:
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{group}]\n{entry}\n" for group, entry in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)


def run_with(folder, *args):
    return run(*args, env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "100"})


BROKEN = (
    "the command 'snap' comes from snapper 1.0, whose module snapper failed: RuntimeError: it is "
    "broken; `condmod doctor` shows the traceback"
)


@pytest.fixture
def broken(tmp_path):
    """A folder with a distribution whose module raises, and with one half removed."""
    groups = {
        "condmod.commands": "snap = snapper:run",
        "condmod.plugins": "snap = snapper",
    }
    third_party(tmp_path, "snapper", groups, snapper="raise RuntimeError('it is\\nbroken')\n")
    groups = {
        "condmod.commands": "haunt = ghost:run",
        "condmod.modulators": "ghost.gate = ghost",
        "condmod.plugins": "haunt = ghost",
    }
    third_party(tmp_path, "ghost", groups, metadata=False)
    return tmp_path


def test_a_broken_command_harms_no_help_and_no_listing(broken):
    shown = run_with(broken, "--help")
    assert shown.returncode == 0, shown.stderr
    for name in ("snap", "haunt"):
        line = next(line for line in shown.stdout.splitlines() if f" {name} " in line)
        assert "failed; see condmod doctor" in line
    assert "Learn to draw handwritten digits" in shown.stdout
    for args in (["list"], ["plugins"], ["list", "--json"], ["validate", "film"]):
        done = run_with(broken, *args)
        assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads(run_with(broken, "plugins", "--json").stdout)
    ours = {row["distribution"]: row for row in rows}
    assert ours["snapper 1.0"]["commands"] == ours["snapper 1.0"]["hooks"] == ["snap"]
    assert ours["unknown"]["commands"] == ["haunt"]
    assert ours["unknown"]["components"] == ["ghost.gate"]


@pytest.mark.parametrize("args", [["snap"], ["snap", "--help"], ["snap", "x", "--y=1"]])
def test_a_broken_command_tells_its_distribution_and_reason(broken, args):
    done = run_with(broken, *args)
    assert (done.returncode, done.stderr) == (1, f"error: {BROKEN}\n")


def test_a_half_removed_command_is_told_too(broken):
    done = run_with(broken, "haunt")
    assert (done.returncode, done.stderr) == (
        1,
        "error: the command 'haunt' comes from unknown, whose module ghost failed: "
        "ModuleNotFoundError: No module named 'ghost'; `condmod doctor` shows the traceback\n",
    )


def test_doctor_checks_commands_and_plugins_too(broken):
    done = run_with(broken, "doctor", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert report["commands"].pop("haunt").startswith("the command 'haunt' comes from unknown,")
    fine = dict.fromkeys(("compare", "demo", "sample", "train"), "")
    assert report["commands"] == {**fine, "snap": BROKEN}
    assert report["plugins"]["condmod_lab"] == report["plugins"]["condmod_hosts"] == ""
    assert report["plugins"]["snapper"] == (
        "the plugin 'snap' comes from snapper 1.0, whose module snapper failed: RuntimeError: it "
        "is broken; `condmod doctor` shows the traceback"
    )
    assert "raise RuntimeError('it is" in report["tracebacks"]["command snap"]
    assert report["tracebacks"]["plugin snapper"].startswith("Traceback")
    text = run_with(broken, "doctor").stdout
    assert "\n4 of 6 commands are well\n2 of 4 plugins are well\n" in text
    assert f"\ncommand snap: {BROKEN}\n" in text
    assert "\nTraceback of plugin snapper:\n" in text


def test_a_broken_plugin_harms_no_file_of_another(broken):
    assert run_with(broken, "validate", "examples/digits.yaml", "--as", "train").returncode == 0
    done = run_with(broken, "validate", "examples/digits.yaml", "--as", "snapshot")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the plugin ")


def test_two_distributions_with_one_command_are_told_both_and_the_others_go_on(tmp_path):
    text = "def run() -> None:\n    print('here')\n"
    for name in ("one", "two"):
        groups = {"condmod.commands": f"snap = {name}_module:run"}
        third_party(tmp_path, name, groups, **{f"{name}_module": text})
    third_party(tmp_path, "three", {"condmod.commands": "list = three:run\nsnip = three:run"})
    (tmp_path / "three.py").write_text(text)
    done = run_with(tmp_path, "snap")
    assert (done.returncode, done.stderr) == (
        1,
        "error: the command 'snap' is claimed by one 1.0 and two 1.0; uninstall one, or shut it "
        "out with CONDMOD_DISABLE=<distribution>\n",
    )
    assert run_with(tmp_path, "snip").stdout == "here\n"
    assert run_with(tmp_path, "list", "film").stdout.startswith("name")
    assert run_with(tmp_path, "--help").returncode == 0
    done = run_with(tmp_path, "doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["commands"]["list"].startswith(
        "the command 'list' is claimed by three 1.0 and condmod 0.1.0; "
    )


def test_a_name_of_both_roles_is_listed_under_both(tmp_path):
    groups = {"condmod.modulators": "both.ways = both", "condmod.encoders": "both.ways = both"}
    third_party(tmp_path, "both", groups)
    rows = json.loads(run_with(tmp_path, "list", "both.*", "--json").stdout)
    assert rows == [
        {"name": "both.ways", "role": role, "from": "both 1.0"} for role in ("encoder", "modulator")
    ]
    done = run_with(tmp_path, "plugins")
    assert "both 1.0\n  components: both.ways\n" in done.stdout


@pytest.mark.parametrize("args", [["list"], ["--help"], ["list", "--json"], ["nonsense"]])
def test_a_reader_that_stops_reading_sees_no_traceback(args):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-X", "dev", "-W", "ignore", *CONDMOD[1:], *args]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode in {1, 2}
    assert "Traceback" not in done.stderr
    assert "BrokenPipeError" not in done.stderr


@pytest.mark.parametrize(
    ("content", "came"),
    [("5", "int: 5"), ("true", "bool: True"), ("[film, 3]", "list: ['film', 3]"), ("", "nothing")],
)
@pytest.mark.parametrize("options", [[], ["--as", "train"]])
def test_a_file_that_is_neither_spec_nor_fields_is_a_users_error(tmp_path, content, came, options):
    path = tmp_path / "spec.yaml"
    path.write_text(content)
    done = run("validate", str(path), *options)
    assert (done.returncode, done.stderr) == (
        1,
        f"error: '{path}' holds a spec, as text or as a mapping with the key 'name', or a mapping "
        f"of fields; got {came}\n",
    )


def test_validate_reads_json_as_json(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text('{\n\t"name": "film",\n\t"scale": "one_plus"\n}\n')  # tabs are no YAML
    assert json.loads(run("validate", str(path), "--json").stdout)["scale"] == "one_plus"
    path.write_text('{"name": "film",\n "scale": }')
    done = run("validate", str(path))
    assert (done.returncode, done.stderr) == (
        1,
        f"error: '{path}', line 2, column 11: Expecting value\n",
    )


def test_a_misspelt_required_option_is_one_error():
    done = run("validate", "label(clases=3)")
    assert done.stderr == (
        "error: label has no option 'clases'; did you mean 'classes'?\n"
        "  label(clases=3)\n"
        "        ^^^^^^\n"
    )


def test_version():
    assert run("--version").stdout == "condmod 0.1.0\n"


def test_a_locale_without_greek_shows_escapes():
    done = run(
        "show", "film", env={**os.environ, "PYTHONIOENCODING": "latin-1"}, encoding="latin-1"
    )
    assert done.returncode == 0, done.stderr
    assert "\\u03b3" in done.stdout


def test_an_output_that_is_full_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*CONDMOD, "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_the_long_list_tells_conditions_start_cost_and_equation():
    lines = run("list", "adaln_z*", "--long", "--features", "8", "--condition-dim", "4").stdout
    head, row = lines.splitlines()
    assert head.split() == [
        *("name", "role", "conditions", "init", "parameters", "passes", "source", "equation")
    ]
    assert row.split("  ")[0] == "adaln_zero"
    for cell in (
        *("aligned, global, rows", "published, identity", "  240 ", "  3 "),  # 6 * 8 * 4 + 6 * 8
        *("arXiv:2212.09748", "x + gate·f("),
    ):
        assert cell in row, row


def test_the_long_list_goes_on_past_what_fails(tmp_path):
    groups = {"condmod.modulators": "film.snap = snapper"}
    third_party(tmp_path, "snapper", groups, snapper="raise RuntimeError('it is broken')\n")
    rows = json.loads(run_with(tmp_path, "list", "film*", "--long", "--json").stdout)
    told = {row["name"]: row["equation"] for row in rows}
    assert told["film"].startswith("FiLM: y = ")
    assert told["film.snap"] == (
        "'film.snap' comes from snapper 1.0, whose module snapper failed: RuntimeError: it is "
        "broken; `condmod doctor` shows the traceback"
    )


def test_show_counts_parameters_and_passes_at_a_place():
    out = run("show", "film(scale='raw')", "--features", "10", "--condition-dim", "5").stdout
    assert "Parameters at features=10, condition_dim=5: 120\n" in out  # 2 * 10 * 5 + 2 * 10
    assert "Passes over x in eager mode: 1 (addcmul)\n" in out
    shared = run("show", "adaln_single", "--features", "8", "--condition-dim", "4").stdout
    assert "Parameters at features=8, condition_dim=4: 48 and 240 that all sites share" in shared
    assert "3 (native_layer_norm, 2 x addcmul)" in shared
    assert "Parameters at out_dim=6: " in run("show", "timestep", "--condition-dim", "6").stdout
    without = run("show", "conditional_batch_norm").stdout
    assert (
        "Cost at features=64, condition_dim=128: conditional_batch_norm needs the option 'classes'"
        in without
    )
    costs = json.loads(run("show", "film", "--json").stdout)["cost"]
    assert costs == {"parameters": 16512, "shared": 0, "passes": ["addcmul"]}
