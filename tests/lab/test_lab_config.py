"""A training config is checked field by field before anything runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import condmod
import condmod_lab
from condmod import SpecError
from condmod_lab.config import TrainConfig, load_config, make_config
from condmod_lab.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"


def test_the_example_file_spells_out_the_defaults() -> None:
    assert load_config(EXAMPLE) == TrainConfig().resolve(10)


def test_validate_and_schema_know_what_train_reads() -> None:
    assert condmod_lab.condmod_documents() == {"train": condmod.Document(TrainConfig, load_config)}
    schema = TrainConfig.model_json_schema()
    assert schema["properties"].keys() == TrainConfig.model_fields.keys()
    done = subprocess.run(
        [sys.executable, "-c", "from condmod.cli import main; main()", "validate", str(EXAMPLE)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "dense_film" in done.stdout


def test_the_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = make_config(
        {"modulator": "film(scale='one_plus')"}, ["training.learning_rate=1e-3", "seed=7"]
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.steps=12", lambda c: c.training.steps == 12),
        ("training.learning_rate=1e-3", lambda c: c.training.learning_rate == 0.001),
        ("training.clip=2", lambda c: c.training.clip == 2.0),
        ("modulator=film", lambda c: str(c.modulator) == "film"),
        ("modulator=none", lambda c: str(c.modulator) == "none"),
        ("modulator={name: film, scale: one_plus}", lambda c: c.modulator.scale == "one_plus"),
        ("modulator=dense_film(hidden=[8, 8])", lambda c: c.modulator.hidden == (8, 8)),
        ("encoder=fuse(inputs={'time': timestep})", lambda c: "time" in c.encoder.inputs),
        ("output='runs/of mine'", lambda c: c.output == "runs/of mine"),
    ],
)
def test_an_override_sets_its_field(override: str, read) -> None:
    assert read(make_config({}, [override]))


def test_an_override_keeps_its_neighbours_and_the_last_one_wins() -> None:
    config = make_config(
        {"training": {"batch": 64}}, ["training.steps=5", "training.steps=6", "seed=1"]
    )
    assert (config.training.batch, config.training.steps, config.seed) == (64, 6, 1)


def test_another_network_takes_no_fields_of_the_one_before() -> None:
    config = make_config(
        {"backbone": {"groups": 4}},
        ["backbone.name=transformer", "backbone.patch=4"],
    )
    assert (config.backbone.name, config.backbone.patch) == ("transformer", 4)
    assert make_config({"backbone": {"groups": 4}}, ["backbone.name=conv"]).backbone.groups == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "steps=5",
            "--set steps=5: a config has no field 'steps'; "
            "did you mean 'training.steps' or 'sampling.steps'?",
        ),
        (
            "training.setps=5",
            "--set training.setps=5: a config has no field 'training.setps'; "
            "did you mean 'training.steps'?",
        ),
        (
            "modulator.scale=raw",
            "--set modulator.scale=raw: a config has no field 'modulator.scale'; "
            "modulator is one spec, set it as a whole, as in modulator='film(scale=...)'",
        ),
        (
            "backbone={channels: 8}",
            "--set backbone={channels: 8}: a config has no field 'backbone'; set one of "
            "backbone.name, backbone.channels, backbone.blocks, backbone.groups, "
            "backbone.condition_dim, backbone.heads, backbone.patch",
        ),
        ("seed", "--set takes key=value, as in training.steps=500; got 'seed'"),
        (
            "training.steps=0",
            "the config is wrong:\n  training.steps: should be greater than or equal to 1; got 0",
        ),
        (
            "training.steps=yes",
            "the config is wrong:\n  training.steps: should be a valid integer; got True",
        ),
        (
            "training.batch='64'",
            "the config is wrong:\n  training.batch: should be a valid integer; got '64'",
        ),
        (
            "backbone.groups=5",
            "the config is wrong:\n  backbone: groups (5) must divide channels (32)",
        ),
        (
            "backbone.name=unet",
            "the config is wrong:\n  backbone.name: should be 'conv', 'transformer'; got 'unet'",
        ),
        (
            "backbone.patch=2",
            "the config is wrong:\n  backbone.patch: no such field; "
            "it is one of backbone.name=transformer",
        ),
        (
            "data.name=folder",
            "the config is wrong:\n  data.path: required; got no value",
        ),
        (
            "trackers=tensorboard",
            "the config is wrong:\n  trackers: should be a list; got 'tensorboard'",
        ),
        (
            "training.learning_rate=.inf",
            "the config is wrong:\n  training.learning_rate: should be a finite number; got inf",
        ),
    ],
)
def test_a_wrong_override_says_rule_what_came_and_mend(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({}, [override])
    assert str(caught.value) == message


def test_an_unknown_modulator_is_pointed_at_and_the_nearest_offered() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({}, ["modulator=dense_flim"])
    assert "did you mean 'dense_film'?" in str(caught.value)
    assert "\n    ^" in str(caught.value)


def test_an_encoder_does_not_fill_a_modulators_place() -> None:
    with pytest.raises(ConfigError, match="modulator: "):
        make_config({"modulator": "timestep"})


def test_every_mistake_in_a_file_is_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("seeed: 1\ntraining:\n  steps: many\n  decay: 0.1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value) == (
        f"the config '{file}' is wrong:\n"
        "  training.steps: should be a valid integer; got 'many'\n"
        "  training.decay: no such field; did you mean 'training.weight_decay'?\n"
        "  seeed: no such field; did you mean 'seed'?"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modulator: [", "line 1, column 13: "),
        ("seed: 1\nseed: 2\n", "the key 'seed' stands twice"),
        ("- film\n", "holds fields such as 'modulator: film'; got list"),
        ("", "holds fields such as 'modulator: film'; got NoneType"),
        ("seed: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_config_says_so(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match=re.escape(message)):
        load_config(file)


def test_a_missing_or_binary_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read '.*': No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(SpecError, match="it is not UTF-8 text"):
        load_config(tmp_path / "binary.yaml")
