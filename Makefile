# make quickstart: the whole pipeline in small   make test: checks and tests   make bench: the CPU benchmark tables
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install quickstart check test bench clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## Create .venv and install lion_st with everything its tests need

# torch comes first: asked for by range, the index's newest build would bring gigabytes of CUDA to a CPU machine.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

quickstart: install  ## Train, evaluate, export and query a sparse and a dense micro retriever
	$(BIN)/python training_scripts/quickstart.py

check: install  ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check  ## Run the checks and the test suite
	$(BIN)/python -m pytest

bench: quickstart  ## Run the CPU benchmarks and print their tables
	$(BIN)/python benchmarks/sparse_head.py
	$(BIN)/python benchmarks/sparse_head.py --weight-gradient
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/query_encoders.py

clean:  ## Remove the virtual environment and all runs
	rm -rf $(VENV) runs
