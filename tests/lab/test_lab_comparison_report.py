"""A comparison is shown whole, in every form, whatever its specs are called and however it went."""

import base64
import csv
import io
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from rich.console import Console
from torch import Tensor

from condmod_lab import comparison_charts as charts
from condmod_lab import comparison_report as report
from condmod_lab.paired import FIGURES, summarise

SPECS = ("film", "dense_film", "film(scale='one_plus')", "none")
LONG = (
    "multi_condition(inputs={'time': film(init='identity'), 'label': dense_film}, mode='product')"
)
STEPS = [float(step) for step in range(10, 1010, 10)]


def make(*specs: str, seeds: int = 3, failed: str = "") -> dict[str, Any]:
    """A comparison in which `none` is far worse and `failed` was lost under the last seed."""
    generator = torch.Generator().manual_seed(0)
    items: dict[str, dict[str, Tensor]] = {}
    for spec in specs:
        level = 0.1 if spec == "none" else 0.9
        table = level + 0.05 * torch.randn(seeds, 50, generator=generator)
        table[-1] *= math.nan if spec == failed else 1
        items[spec] = {figure.name: table for figure in FIGURES}
        items[spec]["held_out_loss"] = 1.2 - table
    lost = {spec: math.nan if spec == failed else 0.05 for spec in specs}
    costs = {
        spec: {
            "parameters": [100_000.0 + 1000 * place] * seeds,
            "step_seconds": [*[0.04] * (seeds - 1), lost[spec]],
            "sample_seconds": [*[4.0] * (seeds - 1), lost[spec]],
        }
        for place, spec in enumerate(specs)
    }
    losses = [0.3 + 10 / step for step in STEPS]
    curve = {
        "step": STEPS,
        "loss": losses,
        "low": [0.9 * loss for loss in losses],
        "high": [1.1 * loss for loss in losses],
    }
    return {
        "specs": list(specs),
        "seeds": list(range(seeds)),
        "command": "condmod compare " + " ".join(specs),
        "config": {
            "modulator": "none",
            "seed": 0,
            "output": "runs/compare",
            "data": {"name": "digits"},
            "backbone": {"name": "conv", "channels": 32},
            "training": {"steps": 1500, "batch": 128},
            "sampling": {"samples": 1000, "steps": 25, "guidance": 1.0},
        },
        "machine": {"torch": "2.13.0", "cpus": 2, "device": "cpu", "jobs": 2, "threads": 1},
        "failed": {f"{failed} seed {seeds - 1}": "the loss is <nan>"} if failed else {},
        **summarise(specs, range(seeds), items, costs),
        "curves": dict.fromkeys(specs, curve),
    }


class Page(HTMLParser):
    """What a page links to and says; it fails on tags that do not close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in {"meta", "link", "img", "br"}:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., Page]:
    """Write a comparison's page and read it."""

    def write(document: dict[str, Any], *, side: int = 8, channels: int = 1) -> Page:
        grid = torch.linspace(-1, 1, 3 * 2 * channels * side**2).view(3, 2, channels, side, side)
        grids = dict.fromkeys(document["specs"], grid)
        path = tmp_path / "report.html"
        report.write_html(document, grids, path, real=grid, ink=True)
        return Page(path)

    return write


def test_a_page_loads_nothing_and_holds_no_script(page: Callable[..., Page]) -> None:
    found = page(make(*SPECS))
    assert {link[:1] if link[0] == "#" else link[:5] for link in found.links} == {"#", "data:"}
    assert "script" not in found.tags
    assert not re.search(r"https?://|@import|url\((?!#)", found.source)
    anchors = {link[1:] for link in found.links if link[0] == "#"}
    assert anchors <= set(re.findall(r'\bid="([^"]+)"', found.source))


def test_a_page_holds_every_spec_figure_and_standing_as_text(page: Callable[..., Page]) -> None:
    document = make(*SPECS)
    text = page(document).text
    for figure in FIGURES:
        assert figure.title in text
        assert figure.meaning in text
    for words in document["standings"].values():
        assert words.replace("`", "") in text
    for spec in SPECS:
        assert text.count(spec) > 10
    for note in ("1,500 steps of 128 images", "0, 1, 2", "condmod compare film", "2 runs went"):
        assert note in text
    assert document["caution"] in text


def test_a_spec_is_text_in_a_page_whatever_it_holds(page: Callable[..., Page]) -> None:
    nasty = "film(scale='<b>\"&amp;{{ 1 }}')"
    found = page(make("film", nasty, failed=nasty))
    assert "b" not in found.tags
    assert nasty in found.text
    assert "the loss is <nan>" in found.text
    assert found.images[2]["alt"] == f"Images drawn with {nasty}, a row per class"


def test_every_picture_of_a_page_says_what_it_shows(page: Callable[..., Page]) -> None:
    found = page(make(*SPECS))
    assert len(found.images) == 1 + len(SPECS)
    assert all(image["alt"] for image in found.images)
    for svg in re.findall(r"<svg[^>]*>", re.sub(r"<svg x=[^>]*>", "", found.source)):
        assert 'aria-hidden="true"' in svg or "aria-label=" in svg or 'class="axis"' in svg


def pixels(image: dict[str, str | None]) -> Tensor:
    """The picture in an image's address, (H, W, 4)."""
    source = image["src"]
    assert source is not None
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    return torch.from_numpy(matplotlib.image.imread(io.BytesIO(data), "png"))


@pytest.mark.parametrize(("ink", "shade"), [(True, 0.0), (False, 1.0)])
def test_a_sample_is_dark_where_it_is_ink_and_light_where_it_is_light(
    tmp_path: Path, ink: bool, shade: float
) -> None:
    grid = -torch.ones(2, 3, 1, 4, 4)
    grid[1, 2] = 1
    grid[1, 1] = math.nan
    document = make("film", "none")
    report.write_html(document, {"film": grid}, tmp_path / "x.html", real=grid, ink=ink)
    real, drawn = map(pixels, Page(tmp_path / "x.html").images)
    assert torch.equal(real, drawn)
    assert real.shape == (2 * 5 - 1, 3 * 5 - 1, 4)
    assert (real[5:, 10:, :3] == shade).all()
    assert (real[:4, :4, :3] == 1 - shade).all()
    assert torch.equal(real[5:, 5:9], real[:4, :4])  # what is no number is blank
    assert (real[4, :, 3] == 0).all()  # the gaps are clear
    assert (real[:4, :4, 3] == 1).all()


def test_a_sample_in_colour_keeps_its_colours(tmp_path: Path) -> None:
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 8, 8)
    report.write_html(make("film", "none"), {}, tmp_path / "x.html", real=red, ink=True)
    (image,) = Page(tmp_path / "x.html").images
    assert (pixels(image)[..., :3] == torch.tensor([1.0, 0.0, 0.0])).all()
    assert (image["width"], image["height"]) == ("256", "256")  # whole pixels of 32


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("count", [2, 5, 15])
def test_everything_is_made_of_few_and_of_many_specs_under_one_seed_and_several(
    tmp_path: Path, page: Callable[..., Page], console: Console, seeds: int, count: int
) -> None:
    specs = [*(f"film(hidden=[{width}])" for width in range(count - 2)), LONG, "none"]
    document = make(*specs, seeds=seeds)
    report.print_table(document, console)
    report.draw_comparison(document, tmp_path / "comparison.png")
    found = page(document)
    assert ("±" in console.file.getvalue()) == ("±" in found.text) == (seeds > 1)  # type: ignore[attr-defined]
    picture = matplotlib.image.imread(tmp_path / "comparison.png")
    assert (picture[..., :3].min(-1) < 0.5).sum() > 5000


def test_a_table_is_whole_in_eighty_columns(console: Console) -> None:
    console.width = 80
    document = make("film", LONG, "none")
    report.print_table(document, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in printed
    for figure in document["figures"].values():
        for part in figure["specs"].values():
            factor = 1000 if figure["unit"] == "ms" else 1
            assert f"{factor * part['mean']:,.{figure['digits']}f}" in printed
    held = next(line for line in lines if line.startswith("film"))
    assert re.fullmatch(r"film +0\.\d{4}[*~] +.*", held)
    squeezed = printed.replace("\n", "")
    assert all(word in squeezed for word in document["standings"]["recall"].split())
    assert "0 of them" not in squeezed


def test_a_failed_run_is_told_and_its_figures_are_not_available_and_never_best(
    tmp_path: Path, page: Callable[..., Page], console: Console
) -> None:
    document = make("film", "add", "none", failed="add")
    report.print_table(document, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    row = next(line for line in printed.splitlines() if line.startswith("add"))
    assert row.split() == ["add", *["n/a"] * 6]
    assert "failed: add seed 2: the loss is <nan>" in printed
    report.write_csv(document, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = {row["spec"]: row for row in csv.DictReader(file)}
    assert rows["add"]["recall_mean"] == rows["add"]["recall_spread"] == ""
    assert rows["add"]["parameters_mean"] == "101000.0"
    report.draw_comparison(document, tmp_path / "comparison.png")
    found = page(document)
    assert found.text.count("n/a") > 6
    best = re.findall(r'<tr><th scope="row">.*?</tr>', found.source, re.DOTALL)[1]
    assert "add" in best
    assert "best" not in best


def test_runs_that_logged_no_loss_have_no_curve(tmp_path: Path, page: Callable[..., Page]) -> None:
    document = make("film", "none", failed="film")
    document["curves"]["film"] = {"step": [], "loss": [], "low": [], "high": []}
    found = charts.curves(document)
    assert found is not None
    assert [line.spec for line in found.lines] == [1]
    document["curves"]["none"] = document["curves"]["film"]
    report.draw_comparison(document, tmp_path / "comparison.png")
    assert "No run has logged its loss." in page(document).text


def test_a_csv_has_a_row_per_spec_and_mean_and_spread_of_every_figure(tmp_path: Path) -> None:
    document = make(*SPECS)
    report.write_csv(document, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["spec"] for row in rows] == list(SPECS)
    assert list(rows[0])[1:] == [
        f"{figure.name}_{part}" for figure in FIGURES for part in ("mean", "spread")
    ]
    figure = document["figures"]["precision"]["specs"]["none"]
    assert float(rows[3]["precision_mean"]) == figure["mean"]
    assert float(rows[3]["precision_spread"]) == figure["spread"]


def test_a_csv_has_a_row_per_pair_and_figure(tmp_path: Path) -> None:
    document = make(*SPECS)
    report.write_pairs_csv(document, tmp_path / "pairs.csv")
    with (tmp_path / "pairs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(document["pairs"]) == 6 * 6
    assert rows[2] == {key: str(value) for key, value in document["pairs"][2].items()}


def test_a_forest_shows_what_each_spec_has_more_than_the_first_and_if_that_is_better() -> None:
    document = make(*SPECS)
    for name, kind in [
        ("held_out_loss", "worse"),
        ("conditional_accuracy", "worse"),
        ("diversity_ratio", "other"),
    ]:
        found = charts.forest(document, name)
        assert [row.spec for row in found.rows] == [1, 2, 3]
        far = found.rows[-1]
        assert far.kind == kind
        assert far.text.startswith("+0." if name == "held_out_loss" else "−0.")
        assert (far.right, far.left) == ((True, False) if far.text[0] == "+" else (False, True))
        assert not far.inside  # it would hide the others
        for row in found.rows[:-1]:
            assert 0 < row.low < row.middle < row.high < 100
            assert row.kind == ("same" if row.low < found.zero < row.high else row.kind)
    first = charts.forest(make("none", "film"), "held_out_loss").rows[0]
    assert (first.kind, first.text[0]) == ("better", "−")


def test_a_matrix_says_the_same_from_either_side(page: Callable[..., Page]) -> None:
    found = page(make("film", "dense_film", "none"))
    table = found.source.split('<table class="matrix">')[2]
    cells = re.findall(r'<td class="(\w+)">([^<]*)</td>', table)[1:10]
    assert [cells[place][0] for place in (0, 4, 8)] == ["self"] * 3
    assert (cells[2][0], cells[6][0]) == ("better", "worse")
    assert cells[2][1][1:] == cells[6][1][1:]


def test_a_few_values_far_off_do_not_hide_the_others() -> None:
    assert charts.window([0.97, 0.96, 0.95, 0.09]) == (0.95, 0.97)
    assert charts.window([0.97, 0.09]) == (0.09, 0.97)
    assert charts.window([1.0, 1.0, 1.0, 0.9]) == (0.9, 1.0)
    found = charts.scatter(make(*SPECS), "parameters", "conditional_accuracy")
    assert found is not None
    assert [bool(dot.beyond) for dot in found.dots] == [False, False, False, True]
    assert found.dots[3].beyond.startswith("0.1")


def test_a_curve_is_thinned_by_means_and_loses_what_no_logarithm_can_hold() -> None:
    many = [float(step) for step in range(600)]
    curve = {"step": many, "loss": [2.0] * 600, "low": [1.0] * 600, "high": [3.0] * 600}
    points = charts.thin(curve)
    assert len(points) == 60
    assert points[0] == (4.5, 2.0, 1.0, 3.0)
    broken = {"step": [1.0, 2.0, 3.0], "loss": [1.0, math.nan, 2.0]}
    broken |= {"low": [1.0, 1.0, 0.0], "high": [1.0, math.inf, 3.0]}
    assert charts.thin(broken) == [(1.0, 1.0, 1.0, 1.0)]


def test_the_numbers_at_the_curves_never_overlap() -> None:
    specs = [f"film(hidden=[{width}])" for width in range(15)]
    found = charts.curves(make(*specs))
    assert found is not None
    places = sorted(line.label[1] for line in found.lines)
    assert all(b - a > 16 for a, b in pairwise(places))
    assert places[0] >= 0
    assert places[-1] <= charts.CURVES[1]
