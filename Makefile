# Everything a clone needs, and nothing else installed by hand. `make` alone lists the targets.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The Python that the environment is made from: `make PYTHON=python3.12 setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The file that says: installed, and with these versions.
READY := $(VENV)/.installed
DEMO := build/demo
# The file that says: the libraries that Engram is measured beside are installed.
PEERS := $(VENV)/.peers

.PHONY: help setup demo test lint types docs changelog bench bench-quick bench-others bench-challenge \
    bench-scale clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(READY) ## Make .venv with engram and all that its tests need

$(READY): pyproject.toml constraints.txt src/engram/store/_native.c tools/mend_torchaudio.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "Engram needs Python 3.11 or newer, not " + sys.version.split()[0] + ". Use make PYTHON=python3.11 ...")'
	@echo "Installing what constraints.txt names into $(VENV): some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet \
	    -c constraints.txt -e '.[eeg,torch,hdf5,cluster,report,dev]'
	$(BIN)/python tools/mend_torchaudio.py
	@touch $@

demo: setup ## The whole job on a generated corpus: generate, prepare, train, score, report
	rm -rf $(DEMO)
	$(BIN)/engram demo $(DEMO)

# A file's tests stay together, so that what its fixtures train or prepare is made once. Each process takes
# up to 1.5 GB, hence not one per core of a large machine.
test: setup ## All tests, the docstrings' examples and the documentation's code
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

lint: setup ## Style, and which room may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo

types: setup ## mypy, strict
	$(BIN)/mypy

docs: setup ## Build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

changelog: setup ## Show what the next release will say; a development version says something
	@mkdir -p build
	$(BIN)/towncrier build --draft --version unreleased | tee build/changelog.md
	@if grep -q 'No significant changes' build/changelog.md && grep -q '__version__ = .*dev' src/engram/__init__.py; \
	then echo "No file in changes/ says what changed: see changes/README.md." >&2; exit 1; fi

bench: $(PEERS) ## Measure loading beside other libraries; write results, table and plot (an hour and more, 60 GB)
	$(BIN)/python -m benchmarks.loading

bench-quick: $(PEERS) ## The same, small and short: shows a table, publishes nothing (10 minutes, 20 GB)
	$(BIN)/python -m benchmarks.loading --quick

bench-others: setup ## Measure preparing, memory, training steps and overhead (minutes)
	for name in prepare memory training_step overhead; do $(BIN)/python "benchmarks/$$name.py"; done

bench-challenge: setup ## Compare what may help in the EEG challenge; write the table (an hour and a half)
	$(BIN)/python benchmarks/challenge.py --folder build/challenge \
	    --json benchmarks/results/challenge.json --page docs/reference/challenge-arms.md

bench-scale: setup ## Prepare, read and train on 719 subjects under 4 GB (half an hour, 30 GB)
	$(BIN)/python benchmarks/scale.py

$(PEERS): $(READY) benchmarks/requirements.txt benchmarks/requirements-no-deps.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet \
	    -c constraints.txt -r benchmarks/requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps \
	    -r benchmarks/requirements-no-deps.txt
	@touch $@

clean: ## Remove everything that was made, the environment too
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
