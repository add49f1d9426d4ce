# make quickstart: the whole pipeline in small   make test: checks and tests   make bench: the shorter CPU benchmarks
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install quickstart study-micro lint check test test-fast soak resolve docs bench clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## Create .venv and install lion_st with everything its tests need

# torch comes first, and without an NVIDIA GPU from PyTorch's index of CPU builds: PyPI's build for Linux brings
# gigabytes of CUDA. Where that index cannot be reached, PyPI's build does.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
define install_torch
	$(PYTHON) -m venv $(VENV)
	@if nvidia-smi >/dev/null 2>&1 || ! $(PIP) --retries 1 --timeout 20 --index-url $(CPU_INDEX) "$(TORCH)" 2>/dev/null; then \
		echo "Installing $(TORCH) from pip's own index"; $(PIP) "$(TORCH)"; fi
endef

$(VENV)/.installed: pyproject.toml
	$(install_torch)
	$(PIP) --editable ".[dev]"
	@touch $@ $(VENV)/.quickstart $(VENV)/.study

$(VENV)/.quickstart: pyproject.toml
	$(install_torch)
	$(PIP) --editable ".[train,eval]"
	@touch $@

quickstart: $(VENV)/.quickstart  ## Score a small retriever beside BM25, train one for a minute, search and explain
	$(BIN)/python training_scripts/quickstart.py

$(VENV)/.study: pyproject.toml
	$(install_torch)
	$(PIP) --editable ".[study]"
	@touch $@

study-micro: $(VENV)/.study  ## Compare sparse and dense retrievers of three sizes under one budget of FLOPs, and draw it
	HF_HUB_OFFLINE=1 $(BIN)/lion-st study training_scripts/studies/micro_reduced.yaml --output runs/study-micro

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: lint  ## Lint, formatting, types, the way of imports and the size of files
	$(BIN)/python -m pytest tests/test_structure.py

# Two processes share the files of the suite; each computes on one thread, as two would wait for each other's. Bytecode
# is kept, which images of containers forbid: many tests start processes, and each would compile lion_st anew.
WORKERS ?= 2

test: lint  ## Run the checks and the test suite
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# The most telling tests, in one process: gold values, exactness, options, errors, readers.
FAST := tests/test_structure.py tests/test_package.py tests/test_docstrings.py tests/cli/test_app.py \
	tests/training/test_options.py tests/training/test_recipes.py tests/modules/test_golden_vectors.py \
	tests/kernels/test_splade_pool.py tests/data_ tests/retrieval/test_golden.py tests/indexes/test_indexes.py \
	tests/evaluation/test_metrics.py
SLOW := two_processes or no_extra or nothing_as_large or screened or gradcheck or torch_compile or quantised or bfloat16 or worth_screening or goes_on_from or mixture_trains or folders_are_there or types_fit

test-fast: install  ## Run the most telling tests, in a minute or so
	$(BIN)/python -m pytest $(FAST) -k "not ($(SLOW))"

KILLS ?= 20

soak: install  ## Kill trainings at random, of one process and of two, and compare what they end with
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --kills $(KILLS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --kills $(KILLS) --processes 2

# Of wheels alone, as a user without a compiler gets them.
RESOLVE := uv pip compile pyproject.toml --extra all --only-binary :all: --quiet --output-file /dev/null

resolve: install  ## Resolve lion-st[all] for every Python and platform that it is declared for; needs the network
	$(PIP) uv
	for python in 3.10 3.11 3.12 3.13 3.14; do for platform in x86_64-manylinux_2_34 macos windows; do \
		MACOSX_DEPLOYMENT_TARGET=14.0 $(BIN)/$(RESOLVE) --python-version $$python --python-platform $$platform || exit 1; \
		echo "$$python $$platform resolves"; done; done

docs: install  ## Build the documentation into build/docs
	$(BIN)/mkdocs build --strict --site-dir build/docs

bench: install quickstart  ## Run the shorter CPU benchmarks and print their tables
	$(BIN)/python benchmarks/sparse_head.py
	$(BIN)/python benchmarks/sparse_head.py --weight-gradient
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/query_encoders.py

clean:  ## Remove the virtual environment and all runs
	rm -rf $(VENV) runs
