"""What the parity tests share: packages from PyPI as peers, and the table of what they agree on.

A parity test builds our component and a peer's under equal weights and hands both outputs to
`parity`. It asserts equal shapes and dtypes and a difference within the tolerance, and it makes one
row of docs/parity.json, which the site shows:

    def test_adaln_zero_is_diffusers(parity, peer):
        norms = peer("diffusers.models.normalization")
        theirs = norms.AdaLayerNormZero(64, num_embeddings=None).double()
        ours = create("adaln_zero", features=64, condition_dim=64).double()
        ours.proj.load_state_dict(theirs.linear.state_dict())
        x, c = torch.randn(2, 5, 64).double(), torch.randn(2, 64).double()
        ...
        parity("adaln_zero", "diffusers", "AdaLayerNormZero", ours(x, c), theirs(x, c), x=x, c=c)

- `parity(mechanism, peer, what, ours, theirs, *, tolerance=1e-12, **inputs)`: the component's name,
  the package's name on PyPI, the class or function there, the two outputs (a tensor, or a sequence
  of tensors), and the tensors that went in, whose names and shapes the table shows. Compare in
  float64 with the default tolerance where the peer allows it; else state another one. Gradients
  are outputs too. Calls of one test that differ in no word of their rows make one row, with the
  largest difference: a loop over flags is one row.
- `peer(module)`: a module of a peer, imported without the warnings that its import gives. Never
  import a peer at the top of a test file: most warn, and warnings are errors. A package of `ALONE`
  stands here without its dependencies: the module is run without the package's `__init__`, with
  stand-ins for what is not installed, so only what is written there in plain torch works.
- `timm_layers(name)`: a module of timm/layers by itself, since timm asks for torchvision.

A row that docs/parity.json lacks, or has in vain, fails its test. `make parity` writes the whole
table; while you write a file of tests, this writes the rows of that file alone:

    CONDMOD_WRITE_PARITY=1 .venv/bin/pytest tests/parity/test_parity_film.py
"""

import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch._dynamo
from torch import Tensor

FOLDER = Path(__file__).parent
TABLE = FOLDER.parents[1] / "docs" / "parity.json"
WRITING = "CONDMOD_WRITE_PARITY" in os.environ
COLLECTED = pytest.StashKey[list[str]]()
PASSED = pytest.StashKey[bool]()
WRITTEN = pytest.StashKey[list[dict[str, Any]]]()

# Packages that `make` installs without their dependencies (too heavy, or in conflict with ours),
# and what their modules import in vain.
ALONE = {
    "alphafold3_pytorch": (
        *(f"alphafold3_pytorch.{name}" for name in ("tensor_typing", "attention", "inputs")),
        *(f"alphafold3_pytorch.{name}" for name in ("nlm", "plm", "common.biomolecule")),
        *(f"alphafold3_pytorch.utils.{name}" for name in ("utils", "model_utils")),
        *("Bio", "Bio.PDB", "Bio.PDB.Structure", "Bio.PDB.StructureBuilder"),
        *("colt5_attention", "frame_averaging_pytorch", "taylor_series_linear_attention"),
    ),
    "classifier_free_guidance_pytorch": (
        *(f"classifier_free_guidance_pytorch.{name}" for name in ("bge", "open_clip", "t5")),
        "environs",
    ),
    "denoising_diffusion_pytorch": ("accelerate", "torchvision", "pytorch_fid"),
    "fme": ("fme.core.benchmark.timer", "fme.core.models.conditional_sfno.lora"),
    "k_diffusion": ("dctorch", "k_diffusion.sampling", "torchvision", "torchvision.transforms"),
    "lerobot": (
        *("diffusers", "diffusers.schedulers", "torchvision"),
        *(f"diffusers.schedulers.scheduling_{name}" for name in ("ddim", "ddpm")),
        *(f"lerobot.policies.{name}" for name in ("pretrained", "utils")),
        "lerobot.policies.diffusion.configuration_diffusion",
    ),
    "pytorch_pretrained_biggan": ("boto3", "botocore", "botocore.exceptions"),
    "stable_audio_tools": ("einops_exts",),
    "styletts2": (),
}

Parity = Callable[..., None]


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Iterator[Parity]:
    """Asserts that two outputs agree, and makes a row of the table."""
    test = request.node.nodeid.removeprefix("tests/parity/")
    rows: dict[str, dict[str, Any]] = {}
    held = [] if WRITING else [words(row) for row in read() if row["test"] == test]

    def compare(
        mechanism: str,
        peer: str,
        what: str,
        ours: Tensor | Sequence[Tensor],
        theirs: Tensor | Sequence[Tensor],
        *,
        tolerance: float = 1e-12,
        **inputs: Tensor,
    ) -> None:
        dtype, found = difference(ours, theirs)
        row = {
            "mechanism": mechanism,
            "peer": peer,
            "version": version(peer).partition("+")[0],
            "what": what,
            "shapes": ", ".join(f"{name} {tuple(one.shape)}" for name, one in inputs.items()),
            "dtype": dtype,
            "difference": float(f"{found:.1e}"),
            "tolerance": tolerance,
            "test": test,
        }
        assert found <= tolerance, f"{mechanism} differs from {peer}'s {what} by {found:.2g}"
        key = words(row)
        assert WRITING or key in held, f"docs/parity.json lacks the row {key}: run `make parity`"
        if key not in rows or rows[key]["difference"] < row["difference"]:
            rows[key] = row

    yield compare
    if WRITING:
        request.config.stash.setdefault(WRITTEN, []).extend(rows.values())
    elif request.node.stash.get(PASSED, False) and (idle := set(held) - set(rows)):
        pytest.fail(f"docs/parity.json has rows that no comparison made: {idle}: run `make parity`")


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of a peer."""
    monkeypatch.setenv("K_DIFFUSION_USE_COMPILE", "0")
    return load


@pytest.fixture
def timm_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of timm/layers, without timm's `__init__`, which asks for torchvision."""
    spec = PathFinder.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("timm is not installed: run `make test`")
    package = ModuleType("timm_layers")
    package.__path__ = [f"{spec.submodule_search_locations[0]}/layers"]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    yield lambda name: importlib.import_module(f"{package.__name__}.{name}")
    for name in [name for name in sys.modules if name.startswith(f"{package.__name__}.")]:
        del sys.modules[name]


@pytest.fixture
def table() -> list[dict[str, Any]]:
    """The rows of docs/parity.json."""
    if WRITING:
        pytest.skip("the table is being written")
    return read()


@pytest.fixture
def collected(request: pytest.FixtureRequest) -> list[str]:
    """Every parity test, where the whole folder was collected."""
    known: list[str] = request.config.stash[COLLECTED]
    files = {name.partition("::")[0] for name in known}
    if files != {path.name for path in FOLDER.glob("test_*.py")}:
        pytest.skip("a part of tests/parity was collected")
    return known


class StandIn(MagicMock):
    """A module, or what is taken from one; as a decorator it leaves functions as they are."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = len(args) == 1 and isinstance(args[0], FunctionType)
        return args[0] if plain else super().__call__(*args, **kwargs)


@cache
def load(name: str) -> ModuleType:
    """Import a module without warnings; of a package of ALONE, that module alone."""
    top, limit = name.partition(".")[0], torch._dynamo.config.recompile_limit
    keep = torch._dynamo.config.patch(suppress_errors=False, recompile_limit=limit)
    with keep, warnings.catch_warnings():  # some peers set what others compile under
        warnings.simplefilter("ignore")
        return _alone(name, ALONE[top]) if top in ALONE else importlib.import_module(name)


def _alone(name: str, missing: Sequence[str]) -> ModuleType:
    """Import a module whose packages are bare: known by their place, but not run."""
    stand_ins = {other: StandIn(__spec__=None) for other in missing if other not in sys.modules}
    sys.modules.update(stand_ins)
    place = None
    *parents, _ = name.split(".")
    for depth in range(1, len(parents) + 1):
        package = ".".join(parents[:depth])
        if package not in sys.modules:
            found = PathFinder.find_spec(package, place)
            if found is None:
                raise ModuleNotFoundError(f"{package} is not installed: run `make test`")
            sys.modules[package] = importlib.util.module_from_spec(found)
        place = sys.modules[package].__path__
    try:
        return importlib.import_module(name)
    finally:
        for other in stand_ins:
            del sys.modules[other]


def difference(
    ours: Tensor | Sequence[Tensor], theirs: Tensor | Sequence[Tensor]
) -> tuple[str, float]:
    """The dtype and the largest difference of two outputs, of equal shapes and dtypes."""
    pairs = [(ours, theirs)] if isinstance(ours, Tensor) else zip(ours, theirs, strict=True)
    largest, dtypes = 0.0, {}
    for one, other in pairs:
        assert one.shape == other.shape, f"{tuple(one.shape)} against {tuple(other.shape)}"
        assert one.dtype == other.dtype, f"{one.dtype} against {other.dtype}"
        assert one.isfinite().all()
        assert other.isfinite().all()
        dtypes[str(one.dtype).removeprefix("torch.")] = None
        largest = max(largest, (one - other).abs().max().item())
    return ", ".join(dtypes), largest


def words(row: dict[str, Any]) -> str:
    """What makes a row that row: neither the measured difference nor the installed version."""
    return ", ".join(str(row[key]) for key in row if key not in {"difference", "version", "test"})


def read() -> list[dict[str, Any]]:
    """The rows of docs/parity.json."""
    rows: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return rows


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to write from several processes."""
    if WRITING and (config.getoption("numprocesses", None) or hasattr(config, "workerinput")):
        raise pytest.UsageError("one process writes docs/parity.json: leave -n out")


@pytest.hookimpl(tryfirst=True)  # before tests are deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note what was collected here."""
    known = [item.nodeid for item in items if item.path.is_relative_to(FOLDER)]
    config.stash[COLLECTED] = [name.removeprefix("tests/parity/") for name in known]


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
    kept = [row for row in read() if row["test"].partition("::")[0] not in run]
    kept = [row for row in kept if (FOLDER / row["test"].partition("::")[0]).is_file()]
    order = ("mechanism", "peer", "what", "dtype", "shapes", "test")
    rows = sorted([*kept, *rows], key=lambda row: [row[key] for key in order])
    new = TABLE.with_suffix(".new")
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    new.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    new.replace(TABLE)
