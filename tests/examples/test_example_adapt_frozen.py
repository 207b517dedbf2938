"""The example that adapts a frozen digit reader runs, and its page says what it measured."""

import contextlib
import importlib
import io
import json
import re
import runpy
import sys
from pathlib import Path
from statistics import fmean

import matplotlib.image
import pytest
import torch

import condmod

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "adapt_frozen"
PAGE = (ROOT / "docs" / "examples-adapt-frozen.md").read_text(encoding="utf-8")
MODULES = ("adaptation", "charts", "run")
FIGURES = ("angles", "sizes", "strips")
RESULTS = json.loads((EXAMPLE / "results.json").read_text(encoding="utf-8"))
FOUND = RESULTS["methods"]
OF_ONE_SIZE = [name for name, found in FOUND.items() if 6500 < found["parameters"] < 8000]


@pytest.fixture(scope="module", autouse=True)
def adaptation():
    """The example's module, imported as its program does; gone when the tests are over."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield importlib.import_module("adaptation")
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, adaptation):
    """Two runs of two steps into one folder: what each printed and found, and the folder."""
    folder = tmp_path_factory.mktemp("adapt_frozen") / "run"
    arguments = ["--seeds", "1", "--steps", "2", "--workers", "1", "--output", str(folder)]
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptation, "ANGLES", (0, 90))
        for _ in range(2):
            printed = execute(arguments)
            found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            runs.append((printed, found))
    return runs, folder


def execute(arguments):
    """Run the program in this process; gives what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["run.py", *arguments])
        runpy.run_path(str(EXAMPLE / "run.py"), run_name="__main__")
    return printed.getvalue()


def mean(name, figure="accuracy"):
    return fmean(FOUND[name][figure])


def test_the_program_prints_the_plan_and_the_table_and_writes_results_figures_and_weights(tiny):
    runs, folder = tiny
    printed, results = runs[0]
    assert "8 sites, condition_dim 8, 7,336 parameters" in printed
    assert (folder / "table.md").read_text(encoding="utf-8") in printed
    assert results["methods"].keys() == FOUND.keys()
    for figure in FIGURES:
        picture = matplotlib.image.imread(folder / f"adapt-frozen-{figure}.png")
        assert len({tuple(pixel) for pixel in picture[::3, ::3].reshape(-1, 4)}) > 20
    for name in ("attached", "lora"):
        kept = folder / "weights" / "0" / "lora-rank-2-and-film-attached" / name
        assert list(kept.glob("*.safetensors")), name


def test_the_same_run_gives_the_same_numbers(tiny):
    (_, first), (_, second) = tiny[0]
    assert first == second


def test_parameters_sizes_and_what_keeps_the_base_are_those_of_the_committed_run(tiny):
    (_, results), *_ = tiny[0]
    for name, found in results["methods"].items():
        same = {key: FOUND[name][key] for key in ("parameters", "bytes", "base_kept")}
        assert same == {key: found[key] for key in same}, name


def test_a_saved_adapter_reads_as_before_on_a_fresh_base(tmp_path, adaptation):
    base = adaptation.make_base(0, steps=2)
    model = adaptation.adapt(adaptation.ATTACHED, base, rate=0.03, steps=2, seed=0)
    adaptation.save(adaptation.ATTACHED, model, tmp_path)
    images, angles = adaptation.digits()[2].images[:8], torch.arange(8) * 40.0
    again = condmod.load_pretrained(adaptation.make_base(0, steps=2), tmp_path / "attached").eval()
    with torch.no_grad():  # a pass that is recorded may round its last digit in another way
        logits = adaptation.ATTACHED.read(again, images, angles)
        assert torch.equal(logits, adaptation.ATTACHED.read(model, images, angles))
        assert not torch.equal(logits, base(images))


def test_attached_training_moves_the_bank_alone(adaptation):
    base = adaptation.make_base(0, steps=1)
    model = adaptation.ATTACHED.prepare(base)
    assert {id(p) for p in adaptation.trained(model)} == {id(p) for p in model.bank.parameters()}


def test_every_patch_is_told_where_it_was(adaptation):
    places = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    upright = torch.full((16, 1, 8, 8), -1.0)
    for patch in range(16):
        row, column = 2 * (patch // 4), 2 * (patch % 4)
        upright[patch, 0, row : row + 2, column : column + 2] = 1
    for angle in (90.0, 180.0, 270.0):
        angles = torch.full((16,), angle)
        turned = adaptation.turn(upright, angles)
        torch.testing.assert_close(turned, upright.rot90(int(angle) // 90, (2, 3)))
        bright = torch.nn.functional.avg_pool2d(turned, 2).flatten(1).argmax(1)
        said = adaptation.told(angles, "patches")[torch.arange(16), bright]
        was = torch.stack([places.repeat(4), places.repeat_interleave(4)], dim=1)
        torch.testing.assert_close(said[:, :2], was)


def test_nothing_is_fitted_or_chosen_on_the_digits_of_the_test(adaptation):
    parts = adaptation.digits()
    counts = dict(zip(("learn", "choose", "test"), map(len, parts), strict=True))
    assert counts == RESULTS["digits"]
    assert sum(counts.values()) == 1797
    seen = [{image.numpy().tobytes() for image in part.images} for part in parts]
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & seen[2]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("FiLM attached", "all weights"),
        ("FiLM attached", "LoRA, rank 4"),
        ("FiLM attached", "FiLM attached, told one angle per digit"),
        ("FiLM attached, told one angle per digit", "FiLM attached, told another digit's angle"),
        ("FiLM attached, told another digit's angle", "frozen base"),
        ("FiLM attached, D=2", "LoRA, rank 1, told the angle"),
        ("LoRA, rank 8, told the angle", "FiLM attached, D=16"),
        ("frozen base, digits turned back", "all weights, told the angle"),
    ],
)
def test_the_order_that_the_page_tells_holds_for_every_seed(better, worse):
    pairs = zip(FOUND[better]["accuracy"], FOUND[worse]["accuracy"], strict=True)
    assert all(high > low for high, low in pairs)


@pytest.mark.parametrize("other", ["frozen base", "FiLM attached, told another digit's angle"])
def test_attached_film_gains_far_more_than_chance_and_loses_it_with_wrong_angles(other):
    pairs = zip(FOUND["FiLM attached"]["accuracy"], FOUND[other]["accuracy"], strict=True)
    assert all(own > theirs + 0.2 for own, theirs in pairs)


def test_all_weights_forget_more_of_the_upright_digits_than_attached_film():
    for name in ("all weights", "all weights, told the angle"):
        pairs = zip(FOUND["FiLM attached"]["upright"], FOUND[name]["upright"], strict=True)
        assert all(attached > retrained for attached, retrained in pairs), name


def test_methods_of_one_size_are_within_a_tenth_of_attached_film():
    size = FOUND["FiLM attached"]["parameters"]
    assert len(OF_ONE_SIZE) >= 6
    assert all(abs(FOUND[name]["parameters"] / size - 1) < 0.1 for name in OF_ONE_SIZE)


def test_only_training_all_weights_loses_the_base():
    lost = {name for name, found in FOUND.items() if not found["base_kept"]}
    assert lost == {"all weights", "all weights, told the angle"}


def test_the_page_shows_the_table_and_the_figures_and_no_other_numbers():
    run = importlib.import_module("run")
    table = (EXAMPLE / "table.md").read_text(encoding="utf-8")
    assert table == run.table(RESULTS)
    assert '--8<-- "examples/adapt_frozen/table.md"' in PAGE
    assert re.findall(r"assets/adapt-frozen-(\w+)\.png", PAGE) == list(FIGURES)
    means = {f"{mean(name, key):.3f}" for name in FOUND for key in ("accuracy", "upright")}
    prose = PAGE.partition("## What was found")[2]
    assert len(told := re.findall(r"\b0\.\d{3}\b", prose)) > 15
    assert set(told) <= means
