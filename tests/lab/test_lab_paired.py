"""Differences that are called real are real: simulated, and on figures small enough to check."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from condmod_lab.paired import FIGURES, Difference, Reduce, difference, standing, summarise

ITEM_FIGURES = [figure.name for figure in FIGURES if figure.reduce]
COSTS = [figure.name for figure in FIGURES if figure.reduce is None]


def simulate(
    seeds: int,
    *,
    between: float = 0.0,
    shared: float = 0.0,
    within: float = 0.0,
    truth: float = 0.0,
    reduce: Reduce = "mean",
    experiments: int = 400,
    count: int = 100,
) -> float:
    """Share of simulated comparisons whose difference is called real.

    The noise of the difference lies between seeds, is shared by all seeds of an item, or belongs
    to one item of one seed; each is told as the standard error that it alone gives the mean.
    `truth` is in standard errors too.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    error = math.hypot(between, shared, within)
    hits = 0
    for _ in range(experiments):
        common = 3 * noise(seeds, 1) + 3 * noise(seeds, count)
        a, b = (
            common / 2
            + between * math.sqrt(seeds / 2) * noise(seeds, 1)
            + shared * math.sqrt(count / 2) * noise(1, count)
            + within * math.sqrt(seeds * count / 2) * noise(seeds, count)
            for _ in range(2)
        )
        hits += difference(a + truth * error, b, reduce, draws=200).real
    return hits / experiments


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(
    "noise",
    [
        {"between": 1.0},
        {"within": 1.0},
        {"shared": 1.0},
        {"between": 1.0, "within": 1.0},
        {"between": 1.0, "shared": 1.0},
        {"between": 1.0, "shared": 0.5},
        {"between": 0.3, "shared": 1.0, "within": 0.5},
    ],
    ids=lambda noise: "+".join(f"{value:g} {name}" for name, value in noise.items()),
)
def test_false_alarms_stay_near_five_in_a_hundred_wherever_the_noise_lies(
    seeds: int, noise: dict[str, float]
) -> None:
    assert simulate(seeds, **noise) <= 0.08  # 0.05 and 2.7 standard errors of 400 experiments


@pytest.mark.parametrize("seeds", [3, 5])
def test_medians_raise_no_more_false_alarms_than_means(seeds: int) -> None:
    assert simulate(seeds, between=1.0, shared=1.0, reduce="median", experiments=200) <= 0.08


@pytest.mark.parametrize(
    ("seeds", "truth", "found"), [(3, 10.0, 0.95), (5, 5.0, 0.9), (5, 10.0, 1.0)]
)
def test_a_difference_of_several_standard_errors_is_found(
    seeds: int, truth: float, found: float
) -> None:
    for noise in ({"between": 1.0}, {"within": 1.0}, {"shared": 1.0}):
        assert simulate(seeds, truth=truth, experiments=200, **noise) >= found


def test_with_one_seed_the_items_alone_are_judged_at_five_in_a_hundred() -> None:
    assert 0.02 <= simulate(1, within=1.0) <= 0.08
    assert simulate(1, within=1.0, truth=5.0) >= 0.98
    assert simulate(1, between=1.0, within=0.1) > 0.5  # which the report says in words


def test_what_all_specs_find_hard_cancels() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = 10 * torch.randn(3, 200, generator=generator) + 100 * torch.arange(3.0)[:, None]
    a = hard + 0.1 + 0.1 * torch.randn(3, 200, generator=generator)
    assert difference(a, hard).real
    shuffled = hard[:, torch.randperm(200, generator=generator)].roll(1, 0)
    assert not difference(a, shuffled).real


def test_seeds_alone_give_the_paired_t_interval() -> None:
    a, b = torch.tensor([[1.0], [2.0], [4.5]]), torch.tensor([[0.5], [0.5], [1.0]])
    found = difference(a.expand(3, 50), b.expand(3, 50))
    assert found.mean == pytest.approx(5.5 / 3)
    half = 4.302653 * torch.tensor([0.5, 1.5, 3.5]).std().item() / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))


def test_items_alone_give_the_normal_interval_of_their_mean() -> None:
    a = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    found = difference(a, torch.zeros(1, 500), draws=20_000)
    half = 1.959964 * a.std().item() / math.sqrt(500)
    assert found.high - found.mean == pytest.approx(half, rel=0.02)


def test_items_that_all_seeds_share_count_once_however_many_seeds_there_are() -> None:
    a = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    one, four = difference(a, 0 * a), difference(a.expand(4, 500), 0 * a.expand(4, 500))
    assert (four.low, four.high) == pytest.approx((one.low, one.high))


def test_a_median_is_resampled_as_a_median() -> None:
    """An outlier moves no median; the interval of normal items has its known width."""
    a = torch.randn(1, 999, generator=torch.Generator().manual_seed(0))
    a[0, a[0].argmax()] = 1e9
    found = difference(a, torch.zeros(1, 999), "median")
    assert found.mean == float(a.median())
    half = 1.959964 * math.sqrt(math.pi / 2 / 999)
    assert found.high - found.mean == pytest.approx(half, rel=0.2)


def test_items_are_drawn_alike_in_one_piece_or_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    for reduce in ("mean", "median"):
        whole = difference(a, a.roll(1, 1), reduce)
        with monkeypatch.context() as patch:
            patch.setattr("condmod_lab.paired._CHUNK", 40 * 7)
            assert difference(a, a.roll(1, 1), reduce) == whole


@pytest.mark.parametrize("reduce", ["mean", "median"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_specs_tie_and_constant_differences_are_real(reduce: Reduce, seeds: int) -> None:
    a = torch.rand(seeds, 50, generator=torch.Generator().manual_seed(0))
    assert difference(a, a, reduce) == Difference(0, 0, 0)
    assert not difference(a, a, reduce).real
    ones = torch.ones(seeds, 50)
    assert difference(ones, 0 * ones, reduce) == Difference(1, 1, 1)
    assert difference(ones, 0 * ones, reduce).real


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("reduce", ["mean", "median"])
def test_a_figure_that_is_no_number_in_one_seed_differs_from_nothing(
    bad: float, reduce: Reduce
) -> None:
    a, b = torch.zeros(3, 20), torch.ones(3, 20)
    a[1] = bad
    found = difference(a, b, reduce)
    assert math.isnan(found.mean)
    assert not found.real
    assert not difference(b, a, reduce).real


def document(seeds: int = 3, **levels: float) -> dict[str, Any]:
    """A comparison whose specs differ in every figure by these levels; NaN fails the last seed."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(seeds, 60, generator=generator)
    items = {}
    for spec, level in levels.items():
        whole = 0.01 * torch.randn(seeds, 60, generator=generator) + noise
        whole += (0 if math.isnan(level) else level) - whole.mean()
        whole[-1] *= math.nan if math.isnan(level) else 1
        items[spec] = dict.fromkeys(ITEM_FIGURES, whole)
    costs = {spec: dict.fromkeys(COSTS, [2.0, 4.0, 6.0][:seeds]) for spec in levels}
    return summarise(list(levels), range(seeds), items, costs)


def test_a_summary_has_every_figure_in_order_and_every_pair_of_every_item_figure() -> None:
    found = document(a=1.0, b=2.0, c=3.0)
    assert list(found["figures"]) == [figure.name for figure in FIGURES]
    assert [(pair["figure"], pair["a"], pair["b"]) for pair in found["pairs"]] == [
        (name, *pair) for name in ITEM_FIGURES for pair in [("a", "b"), ("a", "c"), ("b", "c")]
    ]
    assert list(found["standings"]) == ITEM_FIGURES
    pair = found["pairs"][1]
    assert pair["low"] < pair["difference"] < pair["high"] < 0
    assert pair["difference"] == pytest.approx(-2, abs=0.01)
    assert pair["real"]


def test_a_pair_in_a_summary_is_what_the_two_alone_give() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = {spec: torch.rand(3, 40, generator=generator) for spec in "abc"}
    items = {spec: dict.fromkeys(ITEM_FIGURES, table) for spec, table in tables.items()}
    costs = {spec: dict.fromkeys(COSTS, [1.0] * 3) for spec in "abc"}
    for pair in summarise("abc", range(3), items, costs)["pairs"]:
        if pair["figure"] == "diversity_ratio":
            continue  # a mean over pairs, see below
        reduce = "median" if pair["figure"] == "novelty_ratio" else "mean"
        alone = difference(tables[pair["a"]], tables[pair["b"]], reduce)
        assert (pair["difference"], pair["low"], pair["high"]) == pytest.approx(
            (alone.mean, alone.low, alone.high)
        )


def test_a_mean_over_pairs_of_items_varies_twice_as_much_as_its_items_say() -> None:
    """Diversity of equal samplers, judged as pairs and, as precision, as if of single items."""
    generator = torch.Generator().manual_seed(0)
    found = {"diversity_ratio": 0, "precision": 0}
    for _ in range(150):
        points = torch.randn(2, 60, 1, generator=generator) ** 2
        tables = dict(zip("ab", torch.cdist(points, points).mean(2)[:, None], strict=True))
        items = {spec: dict.fromkeys(ITEM_FIGURES, table) for spec, table in tables.items()}
        costs = {spec: {name: [1.0] for name in COSTS} for spec in "ab"}
        for pair in summarise("ab", [0], items, costs)["pairs"]:
            if pair["figure"] in found:
                found[pair["figure"]] += pair["real"]
    assert found["diversity_ratio"] <= 0.1 * 150
    assert found["precision"] > 0.2 * 150


def test_costs_have_mean_and_spread_over_seeds_and_no_pairs() -> None:
    found = document(a=1.0, b=2.0)
    assert found["figures"]["step_seconds"]["specs"]["a"] == {
        "mean": 4.0,
        "spread": 2.0,
        "values": [2.0, 4.0, 6.0],
    }
    assert not {pair["figure"] for pair in found["pairs"]} & set(COSTS)


def test_one_seed_has_no_spread_and_the_caution_says_what_that_means() -> None:
    found = document(seeds=1, a=1.0, b=2.0)
    assert found["figures"]["held_out_loss"]["specs"]["a"]["spread"] is None
    assert found["figures"]["step_seconds"]["specs"]["a"]["spread"] is None
    assert found["caution"].startswith("One seed: the intervals cover which images were drawn, not")


def test_the_caution_counts_the_intervals_and_the_false_alarms_to_expect() -> None:
    assert document(a=1.0, b=1.0, c=1.0)["caution"] == (
        "18 intervals (3 pairs, 6 figures), each at 95% and none corrected for their number: "
        "if no two specs differed, about 0.9 of them would be called real all the same."
    )


def test_a_summary_with_a_failed_run_is_plain_json_and_never_ranks_it() -> None:
    found = document(good=1.0, failed=math.nan)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    part = found["figures"]["held_out_loss"]["specs"]["failed"]
    assert (part["mean"], part["spread"], part["values"][-1]) == (None, None, None)
    assert part["values"][0] is not None
    assert found["pairs"][0]["difference"] is None
    assert found["pairs"][0]["real"] is False
    assert found["standings"]["held_out_loss"] == (
        "`good` has the best mean; not measured in every seed: `failed`"
    )


@pytest.mark.parametrize(
    ("levels", "figure", "words"),
    [
        (
            {"film": 1.0001, "dense_film": 1.0, "none": 2.0},
            "held_out_loss",
            "`dense_film` is best; not told apart from it: `film`; worse: `none`",
        ),
        (
            {"film": 1.0, "dense_film": 1.0, "none": 2.0},
            "conditional_accuracy",
            "`none` is best; worse: `film`, `dense_film`",
        ),
        (
            {"film": 1.0001, "dense_film": 1.0},
            "precision",
            "no two are told apart; `film` has the best mean",
        ),
        (
            {"a": 1.0, "b": 2.0, "c": 3.0},
            "diversity_ratio",
            "1 is the real images' own; 1.000 (`a`) to 3.000 (`c`); told apart: 3 of 3 pairs",
        ),
        (
            {"a": 1.0, "b": math.nan},
            "novelty_ratio",
            "1 is the real images' own; 1.000 (`a`); not measured in every seed: `b`",
        ),
        (
            {"a": math.nan, "b": math.nan},
            "recall",
            "measured in every seed for no spec; not measured in every seed: `a`, `b`",
        ),
    ],
)
def test_a_standing_says_who_is_best_and_who_is_not_told_apart(
    levels: dict[str, float], figure: str, words: str
) -> None:
    assert document(**levels)["standings"][figure] == words


def test_equal_specs_share_the_best_mean() -> None:
    equal = torch.rand(3, 30, generator=torch.Generator().manual_seed(0))
    tables = {"film": equal, "film()": equal, "none": equal - 1}
    items = {spec: dict.fromkeys(ITEM_FIGURES, table) for spec, table in tables.items()}
    costs = {spec: dict.fromkeys(COSTS, [1.0] * 3) for spec in tables}
    found = summarise(list(tables), range(3), items, costs)
    assert found["standings"]["recall"] == "`film` and `film()` share the best mean; worse: `none`"
    without = summarise(["film", "film()"], range(3), items, costs)
    assert without["standings"]["recall"] == (
        "no two are told apart; `film` and `film()` share the best mean"
    )
    first = standing("recall", found["figures"]["recall"], found["pairs"])
    assert first is not None
    assert (first.best, first.tied, first.worse) == (("film", "film()"), (), ("none",))
    assert standing("diversity_ratio", found["figures"]["diversity_ratio"], []) is None
