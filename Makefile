# `make demo` and `make test` need nothing but Python 3.11 and make: they create the environment first.
PYTHON ?= python3
VENV ?= .venv
LIMITS ?= enforce
BENCHMARKS ?= benchmarks/ --all
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/pytest -n logical --dist loadfile -p no:benchmark

.PHONY: help demo test test-slow bench gpu check docs coverage format clean

help:
	@echo "make demo       train, export, verify, classify and benchmark on the built-in data (one minute)"
	@echo "make test       run the fast tests"
	@echo "make test-slow  run the slow tests: whole training runs, servers under load, the wheel in a new environment"
	@echo "make bench      run every benchmark"
	@echo "make gpu        run everything that needs a GPU and write benchmarks/results/gpu-*.md, in ten minutes"
	@echo "make check      run ruff, mypy and the import rules, and build the documentation"
	@echo "make docs       build the documentation into site/"
	@echo "make coverage   run the fast tests and report branch coverage"
	@echo "make format     format the code and apply the fixes of ruff"
	@echo "make clean      remove the environment and all generated files"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: cifarx needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "== creating the environment in $(VENV): once, a few minutes, 6 GB including the CUDA libraries of PyTorch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)
	@echo "== demo: every step on the built-in data"
	@$(BIN)/cifarx demo

test: $(READY)
	@echo "== the fast tests"
	$(PYTEST) -m "not slow" --durations 10

test-slow: $(READY)
	@echo "== the slow tests"
	$(PYTEST) -m slow --durations 10

bench: $(READY)
	@echo "== the benchmarks"
	$(BIN)/pytest $(BENCHMARKS) --limits $(LIMITS) -rx

gpu: $(READY)
	@echo "== everything that needs a GPU"
	$(BIN)/python -m benchmarks.gpu

check: $(READY) docs
	@echo "== ruff, mypy, import rules"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	@echo "== the documentation: every page, link and anchor"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

coverage: $(READY)
	@echo "== the fast tests, with branch coverage"
	$(PYTEST) -m "not slow" --cov --cov-report=
	$(BIN)/coverage report

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) site cifarx-demo logs .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
