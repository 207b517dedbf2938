"""The example that joins MiniLM and a generator of digits runs, and says what it measured."""

import contextlib
import importlib
import io
import json
import random
import re
import runpy
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from PIL import Image

from condmod_lab.data import load_digits
from condmod_lab.metrics import GOALS

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "text_to_digit"
MODULES = ("captions", "generator", "looks", "pictures", "run")
TINY = ("--steps", "2", "--phrasings", "1", "--captions", "40")
SHARED = {
    "a",
    "backward",
    "backwards",
    "forwards",
    "in",
    "left",
    "right",
    "standing",
    "the",
    "to",
    "with",
}
CHANCE = (4 * 165**2 + 6 * 90**2) / 1200**2  # 4 digits have captions of their own besides


@pytest.fixture(scope="module", autouse=True)
def _modules_of_the_example():
    """Its modules can be imported as its programs do, and go when the tests are over."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def results():
    return json.loads((EXAMPLE / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def captions():
    return importlib.import_module("captions")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a run of two steps, and what it printed."""
    folder = tmp_path_factory.mktemp("text_to_digit") / "run"
    return folder, execute("run.py", *TINY, "--output", str(folder))


def execute(program, *arguments):
    """Run a program of the example in this process; gives what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [program, *arguments])
        runpy.run_path(str(EXAMPLE / program), run_name="__main__")
    return printed.getvalue()


def test_the_program_trains_the_adapter_alone_and_writes_weights_figures_and_results(tiny, results):
    folder, printed = tiny
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert found.keys() == results.keys()
    assert found["parameters"] == results["parameters"]
    assert found["pictures"] == results["pictures"]
    assert found["seeds"].keys() == {"0"}
    assert found["seeds"]["0"].keys() == {"pretrained", "random"}
    assert re.search(r"^   0  pretrained  new names +\d\.\d{3}", printed, re.MULTILINE), printed
    for name in ("samples", "said", "numbers"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 500


def test_captions_of_ones_own_are_drawn_by_the_saved_adapter_a_row_for_each(tiny, tmp_path):
    folder, _ = tiny
    output, heights = tmp_path / "own.png", []
    for own in (["a bold slanted five"], ["a bold slanted five", "a thin 2, leaning left"]):
        said = execute("sample.py", *own, "--run", str(folder), "--output", str(output))
        assert said == f"wrote {output}\n"
        with Image.open(output) as picture:
            heights.append(picture.height)
    assert heights[1] - heights[0] == 75  # half an inch


def test_what_was_never_trained_is_said_with_the_command_that_trains(tmp_path):
    with pytest.raises(SystemExit) as stop:
        execute("sample.py", "a five", "--run", str(tmp_path))
    assert str(stop.value) == (
        f"{tmp_path} holds no trained adapter; make one, in some minutes: "
        "python examples/text_to_digit/run.py"
    )


def test_training_knows_no_held_out_caption_name_word_or_look(captions):
    looks = importlib.import_module("looks")
    run = importlib.import_module("run")
    split = load_digits()
    thirds = looks.Thirds(split.train)
    pictures, seen = run.seen(split.train, thirds)
    held_out = {look for digit in range(10) for look in captions.held_out_looks(digit)}
    assert len(held_out) == 20
    assert not held_out & set(seen)
    assert thirds.looks(pictures) == seen

    draws = random.Random(1)
    trained = {captions.write(look, draws, mention=0.8) for look in seen for _ in range(20)}
    test = captions.held_out_captions(1200)
    assert not trained & {caption for _, _, caption in test}
    for digit, name in captions.NEW_NAMES.items():
        own = {
            captions.write(look, draws) for look in captions.seen_looks(digit) for _ in range(50)
        }
        assert not any(name in caption.replace(",", "").split() for caption in own)
    words = set(re.findall("[a-z]+", " ".join(phrases(captions.TRAINED))))
    new = set(re.findall("[a-z]+", " ".join(phrases(captions.NEW))))
    assert new & words == SHARED

    for group, look, caption in test:
        assert (look in held_out) == (group in {"new looks", "all of it new"}), caption
        name = captions.NEW_NAMES.get(look.digit)
        new_name = group in {"new names", "all of it new"} and name is not None
        assert (name in caption.replace(",", "").split()) == new_name, caption


def phrases(language):
    for words in (*language.slants, *language.weights):
        yield from (*words.before, *words.behind)
    for sentence in language.sentences:
        yield re.sub("{.*?}", "", sentence)


def test_slant_and_weight_are_measured_as_they_are_drawn():
    measure = importlib.import_module("looks").measure
    stroke = torch.full((3, 1, 8, 8), -1.0)
    for y in range(8):
        stroke[0, 0, y, 3] = 1.0  # upright
        stroke[1, 0, y, 7 - y] = 1.0  # its top leans right, by a pixel for each
        stroke[2, 0, y, y // 2] = stroke[2, 0, y, y // 2 + 1] = 1.0  # left, and twice as heavy
    slant, weight = measure(stroke).T
    torch.testing.assert_close(slant[:2], torch.tensor([0.0, 1.0]))
    assert slant[2] < -0.4
    torch.testing.assert_close(weight, torch.tensor([1 / 8, 1 / 8, 2 / 8]))


def test_the_committed_results_keep_the_promise(results):
    assert results["seeds"].keys() == {"0", "1", "2"}
    assert results["captions"]["test"] == 1200
    for found in results["seeds"].values():
        own = found["pretrained"]["own"]
        assert all(shares["digit"] >= 0.9 for shares in own.values()), own
        assert abs(found["pretrained"]["shuffled"]["digit"] - CHANCE) < 0.03
        assert own["all"]["slant"] > found["pretrained"]["shuffled"]["slant"] + 0.1
        assert own["all"]["weight"] > found["pretrained"]["shuffled"]["weight"] + 0.1
        assert found["random"]["own"]["new names"]["digit"] < 0.5
        quality = found["pretrained"]["quality"]
        for name, (low, high) in GOALS.items():
            assert low <= quality[name] <= high, (name, quality)


def test_the_page_shows_what_was_measured(results):
    page = (ROOT / "docs" / "examples-text-to-digit.md").read_text(encoding="utf-8")
    missing = [line for line in expected(results) if line not in page]
    assert not missing, "\n".join(missing)


def expected(results):
    """Lines of the page, made of the results."""
    seeds = list(results["seeds"].values())

    def mean(reader, group, name):
        rows = [{**seed[reader]["own"], "shuffled": seed[reader]["shuffled"]} for seed in seeds]
        return f"{fmean(row[group][name] for row in rows):.3f}"

    for group in (*seeds[0]["pretrained"]["own"], "shuffled"):
        shares = [mean("pretrained", group, name) for name in ("digit", "slant", "weight")]
        yield f"| {' | '.join((group, *shares, mean('random', group, 'digit')))} |"
    for number, seed in results["seeds"].items():
        found = seed["pretrained"]
        shares = [found["own"]["all"]["digit"], found["shuffled"]["digit"]]
        shares += [found["quality"][f"{name}_ratio"] for name in ("diversity", "novelty")]
        shares += [found["quality"][name] for name in ("precision", "recall")]
        yield f"| {' | '.join((number, *(f'{share:.3f}' for share in shares)))} |"
    yield f"reads {seeds[0]['pretrained']['quality']['classifier_accuracy']:.3f} of"
    for name, parameters in results["parameters"].items():
        yield f"| {name} | {parameters:,} |"
    yield f"{results['adapter_bytes'] / 2**20:.1f} MiB"
    yield f"{results['pictures']['seen']:,} of the {results['pictures']['training']:,}"
    yield f"{results['captions']['training']:,} captions"
