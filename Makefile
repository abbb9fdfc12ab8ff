# make demo | test | quick | faults | bench | experiment | lint | docs | install: each sets itself up on a machine with Python 3.11+, bash and make.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# Two processes share the tests in the order that tests/conftest.py gives them.
SHARED := -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: demo test quick faults bench experiment lint docs install clean

demo: install
	@bash scripts/demo.sh

test: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest $(SHARED) -m "not faults"

quick: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest $(SHARED) -m "not slow and not faults"

# Real runs of two processes that are killed, starved and lied to: half an hour on two quiet cores.
faults: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest $(SHARED) -m faults

# Kernels, training step and loader on this machine; make bench OUTPUT=benchmarks/results adds to the committed results.
OUTPUT ?= runs/bench
bench: install
	@$(BIN)/video-mae bench kernels output=$(OUTPUT)
	@$(BIN)/video-mae bench step output=$(OUTPUT)
	@$(BIN)/video-mae bench data output=$(OUTPUT)

# Does pretraining help where labels are few? Two hours on two quiet cores; stopped and started again, it goes on.
experiment: install
	@$(BIN)/python experiments/pretraining_helps.py

lint: install
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/basedpyright --warnings

# The documents as a site: open site/index.html. A warning is an error.
docs: install
	@$(BIN)/python -c 'import latex2mathml, material, mkdocstrings' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

install: $(INSTALLED)

# Installs again only when what is to be installed has changed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; name one with make PYTHON=..."'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv build site ./*.egg-info
