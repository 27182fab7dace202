# `make demo` and `make test` work on a fresh clone; they need only Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test check clean

setup: .venv/.complete

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ifvit needs Python >= 3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,rate,table]'
	touch $@

demo: setup
	$(BIN)/ifvit demo

# Two test files at a time, each on one thread; tests that wait for SLURM leave the other one running.
test: export OMP_NUM_THREADS = 1
test: setup
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell ifvit data_pipeline slurm tests tools configs docs *.md

clean:
	rm -rf .venv runs
