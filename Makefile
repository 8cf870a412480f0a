# Every target makes .venv first if it has to: a machine with Python 3.11+, venv, pip and a C++ compiler is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TRITON := .venv-triton
NEWEST := .venv-newest
# a third of the tests: from Dynamo's graph to what Inductor compiles, which is where a new torch breaks things
NEWEST_TESTS := tests/frontend/test_backend.py tests/graph/test_capture.py tests/ops/test_ops.py tests/ops/test_packed.py tests/ops/test_branch_ops.py \
	tests/graph/test_fx.py tests/graph/test_constants.py tests/graph/test_autocast.py tests/passes/test_manager.py tests/test_oracle.py \
	tests/test_oracle_parts.py tests/test_golden.py tests/engine/test_hoisting.py tests/lowering/test_lower_inductor.py tests/engine/test_frozen.py \
	tests/passes tests/expert_dispatch tests/runtime
SERVER := tests/bundle/triton/requirements.txt
PYTEST_ARGS ?=

# One thread per process: the tests run two processes, and torch on shared cores is slower with more.
export OMP_NUM_THREADS ?= 1
# The tests start Python dozens of times: without bytecode on disk each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test engines test-slow test-newest lint format docs docs-site dist bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lint,bench,demo,train,cli,docs,release]'
	touch $@

# Triton's server and client can't live with what the package is tested with
$(TRITON)/.installed: pyproject.toml $(SERVER)
	test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet -r $(SERVER)
	$(TRITON)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

# Linux wheels of torch on PyPI bring CUDA along: 3 GB to fetch, 6 GB on disk
$(NEWEST)/.installed: pyproject.toml
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade torch numpy hypothesis pytest pytest-timeout pytest-xdist '.[models,cli]'
	$(NEWEST)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

install: $(INSTALLED) ## make .venv with the package and all tools

demo: $(INSTALLED) ## sample digits plain and cached, print the table, write demo.png
	$(BIN)/python -m examples.01_generate

# loadfile: what the tests of a file, or of some folders, share is made once, by the process that runs them all
test: $(INSTALLED) ## the tests, without the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# worksteal: S/2 takes as long as all others, and they are in one folder
engines: $(INSTALLED) ## TensorRT-RTX parses and builds every variant of the digits and S/2 bundles; no GPU is needed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow tests/bundle/tensorrt $(PYTEST_ARGS)

test-slow: $(INSTALLED) $(TRITON)/.installed ## the slow tests, some against a Triton server
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-newest: $(NEWEST)/.installed ## a third of the tests with the newest torch, in a venv of its own (6 GB); not in CI
	$(NEWEST)/bin/python -c "import torch; print('torch', torch.__version__)"
	$(NEWEST)/bin/python -m pytest -n 2 --dist loadfile $(NEWEST_TESTS) $(PYTEST_ARGS)

lint: $(INSTALLED) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## put the code in form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## write docs/models.md anew from the tests' results
	MOECA_DOCS=1 $(BIN)/python -m pytest -n 2 -m "slow or not slow" tests/real tests/expert_dispatch tests/passes/test_find_routers.py \
		tests/passes/test_find_experts.py tests/test_data_sizes.py tests/frontend/test_lora.py tests/frontend/test_quantized.py

docs-site: $(INSTALLED) ## build the site of docs/ into build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --site-dir build/site

# twine reads what PyPI would: a page that it can't render is an error
dist: $(INSTALLED) ## the source archive and the wheel, built alone and checked, into dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

bench: $(INSTALLED) ## measure; writes benchmarks/results
	$(BIN)/python -m benchmarks.steps

clean: ## remove .venv and what the tools leave
	rm -rf $(VENV) $(TRITON) $(NEWEST) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
