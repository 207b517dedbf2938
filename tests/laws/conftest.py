"""The conformance table: what every law said of every component, which the site shows.

docs/conformance.json holds a cell per component and law: how many cases keep it, and why others
are skipped. A law's test whose outcome has no place there fails. `make conformance` writes it.
"""

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TABLE = Path(__file__).parents[2] / "docs" / "conformance.json"
WRITING = "CONDMOD_WRITE_CONFORMANCE" in os.environ
KEY = "conformance"
Cells = dict[str, dict[str, dict[str, Any]]]
CELLS: Cells = {}


@pytest.fixture(scope="session")
def conformance_table() -> Cells:
    """Component to law to {"kept": number of cases, "skipped": {reason: number of cases}}."""
    if WRITING:
        pytest.skip("the table is being written")
    return read()


@cache
def read() -> Cells:
    """The committed table."""
    cells: Cells = json.loads(TABLE.read_text(encoding="utf-8"))
    return cells


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Note on every law's test which cell it is about."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if item.path.name == "test_laws.py" and callspec and "law" in callspec.params:
            law, case = callspec.params["law"], callspec.params["case"]
            item.user_properties.append((KEY, [case.component.name, law.__name__]))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Fail a law's test whose outcome the table does not show."""
    result: Any = yield
    report = result.get_result()
    cell = dict(item.user_properties).get(KEY)
    said = outcome(report)
    if not cell or said is None or WRITING or not TABLE.exists():
        return  # where it is missing, the tests of the table say so
    name, law = cell
    if not shown(read(), name, law, said):
        report.outcome = "failed"
        report.longrepr = (
            f"docs/conformance.json has no {said or 'kept'!r} for {name} and the law {law!r}: "
            "run `make conformance`"
        )


def outcome(report: pytest.TestReport) -> str | None:
    """The reason why a test was skipped, "" where it passed, None where it says nothing."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return "" if report.when == "call" and report.passed else None


def shown(cells: Cells, name: str, law: str, said: str) -> bool:
    """Whether the table has this outcome."""
    cell = cells.get(name, {}).get(law, {})
    return said in cell.get("skipped", {}) if said else bool(cell.get("kept"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the outcome, where this process gathers them."""
    cell, said = dict(report.user_properties).get(KEY), outcome(report)
    if WRITING and cell and said is not None:
        name, law = cell
        count = CELLS.setdefault(name, {}).setdefault(law, {"kept": 0, "skipped": {}})
        if said:
            count["skipped"][said] = count["skipped"].get(said, 0) + 1
        else:
            count["kept"] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table, unless something failed; workers leave it to the one that gathers."""
    if WRITING and CELLS and not session.testsfailed and not hasattr(session.config, "workerinput"):
        rows = [f"{json.dumps(name)}: {json.dumps(CELLS[name])}" for name in sorted(CELLS)]
        TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
