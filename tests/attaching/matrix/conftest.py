"""What the tests of the matrix share: a small attached model, and the table of what was measured.

A test measures, and then says what it has found; that makes a row of docs/attaching-matrix.json,
which the site shows:

    def test_a_deep_copy_stays_conditioned(cell, attached):
        ...
        cell("Training", "`copy.deepcopy`: the copy stays conditioned")
        cell("Training", "some other way", refused="why; its error was asserted above")
        cell("CUDA", "some third way", unmeasured="no CUDA device")

A row that the file lacks, or has in vain, fails its test. `make matrix` writes the whole table;
while you write a file of tests, this writes the rows of that file alone:

    CONDMOD_WRITE_MATRIX=1 .venv/bin/pytest tests/attaching/matrix/test_matrix_compile.py
"""

import json
import os
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import condmod

FOLDER = Path(__file__).parent
TABLE = FOLDER.parents[2] / "docs" / "attaching-matrix.json"
WRITING = "CONDMOD_WRITE_MATRIX" in os.environ
UNMEASURED = "not measured"
COLLECTED = pytest.StashKey[list[str]]()
PASSED = pytest.StashKey[bool]()
WRITTEN = pytest.StashKey[list[dict[str, str]]]()
PATTERNS = {
    "blocks.*.norm": "film",
    "blocks.*.mlp": "adaln_zero",
    "head": ("dense_film", "input"),
}
WIDTH, CONDITION = 8, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    """Blocks and a head.

    `checkpointing` is "none", "blocks", "nested", "offloaded" or "reentrant".
    """

    def __init__(self, checkpointing: str = "none", blocks: int = 2) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing == "nested":
            return self.head(checkpoint(self.trunk, x, use_reentrant=False))
        return self.head(self.trunk(x))

    def trunk(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpointing == "none":
                x = block(x)
            elif self.checkpointing == "offloaded":
                with save_on_cpu():
                    x = checkpoint(block, x, use_reentrant=False)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        return x


@pytest.fixture
def attached(drawn: Callable[..., condmod.Conditioned]) -> Callable[..., condmod.Conditioned]:
    """Makes an attached model, the same at every call, whose modulators are not the identity."""

    def make(
        checkpointing: str = "none",
        blocks: int = 2,
        net: type[Net] = Net,
        **options: object,
    ) -> condmod.Conditioned:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return drawn(net(checkpointing, blocks), PATTERNS, **options)

    return make


@pytest.fixture
def net() -> type[Net]:
    """The class of the base."""
    return Net


@pytest.fixture
def x() -> Tensor:
    """Features (2, 4, C), of which gradients are asked."""
    return torch.randn(2, 4, WIDTH, requires_grad=True)


@pytest.fixture
def c() -> Tensor:
    """Four conditions (4, 2, D)."""
    return torch.randn(4, 2, CONDITION)


@pytest.fixture
def gradients(x: Tensor) -> Callable[[nn.Module, Callable[[], object]], list[Tensor]]:
    """Runs something and gives the gradients of x and of every parameter that trains."""

    def run(model: nn.Module, step: Callable[[], object]) -> list[Tensor]:
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        for leaf in leaves:
            leaf.grad = None
        step()
        assert all(leaf.grad is not None for leaf in leaves)
        return [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]

    return run


@pytest.fixture
def is_clean() -> Callable[[condmod.Conditioned], bool]:
    """Whether a model is without a condition, and so refuses to run."""

    def check(conditioned: condmod.Conditioned) -> bool:
        eager = torch.compiler.set_stance("force_eager")  # a compiled block wraps the error
        with eager, pytest.raises(condmod.ConditionError, match="has no condition"):
            conditioned.base(torch.randn(2, 4, WIDTH, requires_grad=True))
        return True

    return check


Cell = Callable[..., None]


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Iterator[Cell]:
    """Notes what was measured of one cell: it works, or is refused or not measured, and why."""
    test = request.node.nodeid.removeprefix("tests/attaching/matrix/")
    made: dict[tuple[str, str], dict[str, str]] = {}
    held = [] if WRITING else [row for row in read() if row["test"] == test]

    def note(group: str, what: str, *, refused: str = "", unmeasured: str = "") -> None:
        verdict = "refused" if refused else UNMEASURED if unmeasured else "works"
        row = {"group": group, "what": what, "verdict": verdict, "reason": refused or unmeasured}
        made[group, what] = {**row, "test": test}
        assert WRITING or any(_agree(row, other) for other in held), (
            f"docs/attaching-matrix.json lacks {row}: run `make matrix`"
        )

    yield note
    if WRITING:
        request.config.stash.setdefault(WRITTEN, []).extend(made.values())
    elif request.node.stash.get(PASSED, False):
        idle = [row["what"] for row in held if (row["group"], row["what"]) not in made]
        assert not idle, (
            f"docs/attaching-matrix.json has cells that nothing measured: {idle}: run `make matrix`"
        )


def _agree(row: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two rows are of one cell and say the same; what was not measured says nothing."""
    said = [{key: one[key] for key in ("verdict", "reason")} for one in (row, other)]
    same = (row["group"], row["what"]) == (other["group"], other["what"])
    return same and (said[0] == said[1] or UNMEASURED in {row["verdict"], other["verdict"]})


@pytest.fixture
def matrix() -> list[dict[str, str]]:
    """The rows of docs/attaching-matrix.json."""
    if WRITING:
        pytest.skip("the table is being written")
    return read()


@pytest.fixture
def collected(request: pytest.FixtureRequest) -> list[str]:
    """Every test of the matrix, where the whole folder was collected."""
    known: list[str] = request.config.stash[COLLECTED]
    files = {name.partition("::")[0] for name in known}
    if files != {path.name for path in FOLDER.glob("test_*.py")}:
        pytest.skip("a part of tests/attaching/matrix was collected")
    return known


@cache
def read() -> list[dict[str, str]]:
    """The rows of docs/attaching-matrix.json."""
    rows: list[dict[str, str]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return rows


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to write from several processes."""
    if WRITING and (config.getoption("numprocesses", None) or hasattr(config, "workerinput")):
        raise pytest.UsageError("one process writes docs/attaching-matrix.json: leave -n out")


@pytest.hookimpl(tryfirst=True)  # before tests are deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note what was collected here."""
    known = [item.nodeid for item in items if item.path.is_relative_to(FOLDER)]
    config.stash[COLLECTED] = [name.removeprefix("tests/attaching/matrix/") for name in known]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell the test's fixtures whether it has passed."""
    report = yield
    if call.when == "call":
        item.stash[PASSED] = report.passed
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the rows of the files that have run; other files keep theirs."""
    if not WRITING or session.testsfailed:
        return
    rows = session.config.stash.get(WRITTEN, [])
    run = {name.partition("::")[0] for name in session.config.stash[COLLECTED]}
    old = read() if TABLE.exists() else []
    kept = [row for row in old if row["test"].partition("::")[0] not in run]
    kept = [row for row in kept if (FOLDER / row["test"].partition("::")[0]).is_file()]
    rows = sorted([*kept, *rows], key=lambda row: row["test"].partition("::")[0])
    new = TABLE.with_suffix(".new")
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    new.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    new.replace(TABLE)
