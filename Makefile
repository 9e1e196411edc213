# `make demo` and `make test` need nothing but Python 3.11 and make: they create the environment first.
PYTHON ?= python3
VENV ?= .venv
LIMITS ?= enforce
BENCHMARKS ?= benchmarks/ --all
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Without reordering, files of a few long tests do not come last, when the other workers have nothing left.
PYTEST := $(BIN)/pytest -n logical --dist loadfile --no-loadscope-reorder -p no:benchmark
OLD_TORCH := .venv-torch-2.11
RAY := .venv-ray
LITERT := .venv-litert
EXECUTORCH := .venv-executorch
WEB := .venv-web
# Where the tests find ONNX Runtime Web, if it was installed.
export NODE_PATH := $(CURDIR)/$(WEB)/node_modules

# Programs start from bytecode, as installed ones do, instead of compiling their modules at every start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-slow test-torch-2.11 test-ray test-litert test-executorch test-web bench gpu check docs coverage format clean

help:
	@echo "make demo       train, export, verify, classify and benchmark on the built-in data (one minute)"
	@echo "make test       run the fast tests"
	@echo "make test-slow  run the slow tests: whole training runs, servers under load, the wheel in a new environment"
	@echo "make test-torch-2.11"
	@echo "                run the tests of CUDA with the oldest supported PyTorch, in an environment of its own"
	@echo "make test-ray   run the tests of Ray Serve and Ray Data on a local cluster, in an environment of its own"
	@echo "make test-litert"
	@echo "                run the tests of the format litert, whose converter needs an older PyTorch, in an environment of its own"
	@echo "make test-executorch"
	@echo "                run the tests of the format executorch, in an environment of its own"
	@echo "make test-web   run the tests of the format web, with Node.js, ONNX Runtime Web from npm and Chromium if there is one"
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

$(OLD_TORCH)/.ready: pyproject.toml constraints.txt
	@echo "== creating the environment in $(OLD_TORCH): once, a few minutes, 6 GB including the CUDA libraries of PyTorch"
	$(PYTHON) -m venv $(OLD_TORCH)
	grep -vE '^(torch|torchvision|triton|cuda-.*|nvidia-.*)==' constraints.txt > $(OLD_TORCH)/constraints.txt
	$(OLD_TORCH)/bin/python -m pip install --disable-pip-version-check --progress-bar off \
		-c $(OLD_TORCH)/constraints.txt -e ".[dev]" "torch==2.11.*" "torchvision==0.26.*"
	@touch $@

test-torch-2.11: $(OLD_TORCH)/.ready
	@echo "== the tests of CUDA, with PyTorch 2.11 and torchvision 0.26"
	$(OLD_TORCH)/bin/pytest -n logical --dist loadfile -p no:benchmark -m simulated_gpu tests/train tests/export tests/serve
	$(OLD_TORCH)/bin/pytest -p no:benchmark -m "not simulated_gpu" tests/train/test_cuda_graph.py

$(RAY)/.ready: pyproject.toml
	@echo "== creating the environment in $(RAY): once, a minute, 1 GB"
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --disable-pip-version-check --progress-bar off \
		-e ".[ray]" hypothesis onnx psutil pytest pytest-timeout pyyaml
	@touch $@

test-ray: $(RAY)/.ready
	@echo "== the tests of Ray, without PyTorch"
	$(RAY)/bin/pytest -p no:cacheprovider tests/serve/test_ray.py tests/serve/test_ray_data.py

$(LITERT)/.ready: pyproject.toml
	@echo "== creating the environment in $(LITERT): once, a few minutes, 7 GB including the CUDA libraries of PyTorch"
	$(PYTHON) -m venv $(LITERT)
	$(LITERT)/bin/python -m pip install --disable-pip-version-check --progress-bar off \
		-e ".[train,litert]" litert-torch hypothesis psutil pytest pytest-timeout pyyaml
	@touch $@

test-litert: $(LITERT)/.ready
	@echo "== the tests of the format litert"
	$(LITERT)/bin/pytest -p no:cacheprovider -p no:anyio tests/export/formats/litert tests/serve/backends/litert

$(EXECUTORCH)/.ready: pyproject.toml constraints.txt
	@echo "== creating the environment in $(EXECUTORCH): once, a few minutes, 7 GB including the CUDA libraries of PyTorch"
	$(PYTHON) -m venv $(EXECUTORCH)
	$(EXECUTORCH)/bin/python -m pip install --disable-pip-version-check --progress-bar off \
		-c constraints.txt -e ".[train,executorch]" hypothesis psutil pytest pytest-timeout pyyaml
	@touch $@

test-executorch: $(EXECUTORCH)/.ready
	@echo "== the tests of the format executorch"
	$(EXECUTORCH)/bin/pytest -p no:cacheprovider \
		tests/export/formats/executorch tests/serve/backends/torch/test_executorch.py

$(WEB)/.ready:
	@echo "== installing ONNX Runtime Web in $(WEB): once, 150 MB"
	npm install --prefix $(WEB) --no-save --no-package-lock --ignore-scripts --no-audit --no-fund onnxruntime-web@1.30
	@touch $@

test-web: $(READY) $(WEB)/.ready
	@echo "== the tests of the format web"
	$(BIN)/pytest -p no:benchmark tests/serve/backends/web tests/export/formats/web tests/e2e/test_web_page.py

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
	rm -rf $(VENV) $(OLD_TORCH) $(RAY) $(LITERT) $(EXECUTORCH) $(WEB) site cifarx-demo logs .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
