"""The page about speed shows what the benchmarks have found, losses too."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


@pytest.fixture
def speed_page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("speed_page")


@pytest.fixture
def found(speed_page):
    return speed_page.results()


def test_every_table_is_what_the_benchmarks_have_found(speed_page, found):
    assert speed_page.written(PAGE, speed_page.tables(found)) == PAGE


def test_every_pass_has_its_line_and_a_loss_is_called_one(found):
    for row in found["passes"]["rows"]:
        ratio = row["faster"]["condmod than hand"]
        noise = row["rounds"] < 50 and ratio["ratio"] >= 1 / 1.2
        lost = ratio["high"] < 1 and not noise
        told = f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        half = " bf16" * (row["dtype"] == "bfloat16")
        start = f"| {row['shape']}{half} | {row['condition']} | {row['mode']} | "
        loss = (
            f"- `{row['pass']}`, {row['mode']}, {row['shape']}{half} {row['condition']}: {told}\n"
        )
        assert any(
            line.startswith(start) and f"| {told}{' **slower**' * lost} |" in line
            for line in PAGE.splitlines()
        ), row
        assert (loss in PAGE) == lost


def test_every_goal_is_met_or_called_missed(found):
    generation = found["generation"]
    for row in [*found["passes"]["rows"], *generation["stages"], *generation["steps"]]:
        for goal in row["goals"]:
            ratio = row["faster"][goal["of"]]
            told = f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            met = "met" if ratio["ratio"] >= goal["by"] else "**missed**"
            one, other = goal["of"].split(" than ")
            assert any(
                f"{one} {goal['by']} times as fast as {other} |" in line
                and line.endswith(f"| {told} | {met} |")
                for line in PAGE.splitlines()
            ), row


def test_it_was_measured_as_users_have_it_and_beside_it_with_memory_kept(found):
    assert found["passes"]["allocator"] == found["generation"]["allocator"] == "default"
    assert "MALLOC_MMAP_MAX_" in found["passes-tuned"]["allocator"]
    assert not found["passes"]["no_compile"]
    assert all(row["rounds"] >= 11 for row in found["passes"]["rows"])
