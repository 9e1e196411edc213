# Two commands do everything, environment included: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
LIMITS ?= judge
BENCHMARKS ?= benchmarks/
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-slow bench check format clean

help:
	@echo "make demo       train, export, verify, classify and benchmark on built-in data (a minute)"
	@echo "make test       the fast tests"
	@echo "make test-slow  the slow ones: the wheel in a clean environment, a whole training run"
	@echo "make bench      the benchmarks"
	@echo "make check      ruff, mypy, import rules"
	@echo "make format     let ruff mend what it can"
	@echo "make clean      remove the environment and everything made"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: cifarx needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "== making the environment in $(VENV): once, some minutes, 6 GB with PyTorch's CUDA libraries"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)
	@echo "== demo: the whole road on built-in data"
	@$(BIN)/cifarx demo

test: $(READY)
	@echo "== the fast tests"
	$(BIN)/pytest -m "not slow" -n logical --dist loadfile -p no:benchmark --durations 10

test-slow: $(READY)
	@echo "== the slow tests"
	$(BIN)/pytest -m slow -n logical --dist loadfile -p no:benchmark --durations 10

bench: $(READY)
	@echo "== the benchmarks"
	$(BIN)/pytest $(BENCHMARKS) --limits $(LIMITS) -rx

check: $(READY)
	@echo "== ruff, mypy, import rules"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) cifarx-demo logs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
