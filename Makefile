# Every target does its own set-up, into .venv. What set-up says goes to stderr, so that `make chat` can be piped.
# PYTHON picks the interpreter (3.11 or newer); PIP_ARGS are passed to pip, e.g. PIP_ARGS=--quiet.

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
KERNELS := $(wildcard organs/kernels/*.py)
BENCHMARKS := $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help chat test bench soak lint docs clean

help:  ## this list
	@echo "make chat is all a newcomer needs. The targets:"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-13s %s\n", $$1, $$2 }'

chat: .venv/warm.stamp  ## talk with the organism; also when you only want to see whether it runs
	@$(BIN)/organism

test: .venv/dev.stamp .venv/warm.stamp .venv/model.stamp  ## the default tests, ten minutes or so; before every commit
	@$(BIN)/python -m pytest

bench: .venv/dev.stamp .venv/warm.stamp  ## print every benchmark's table; when a change should be faster or predict better
	@for file in $(BENCHMARKS); do echo "== $$file" >&2; $(BIN)/python "$$file" || exit 1; done

soak: .venv/dev.stamp .venv/warm.stamp .venv/model.stamp  ## the slow and torture tests, an hour or so; before a release
	@$(BIN)/python -m pytest -n 0 -m "slow or soak"
	@$(BIN)/python -m pytest --reference tests/test_organism.py tests/test_learning.py tests/test_cli.py tests/test_voice.py tests/test_compress.py

lint: .venv/dev.stamp  ## ruff check, ruff format --check, pyright; before every commit
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

docs: .venv/dev.stamp  ## write docs/cli.md anew from --help; when a command or an option has changed
	@$(BIN)/python docs/generate_cli.py

clean:  ## remove .venv and what tools left behind; homes under checkpoints/ are kept
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- Set-up, in three steps, each done once. stdin is closed for them: piped lines belong to the organism. ---

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Set-up 1 of 3: a virtual environment in .venv" >&2
	@$(PYTHON) -m venv .venv < /dev/null >&2

.venv/core.stamp: pyproject.toml | .venv/bin/python
	@echo "Set-up 2 of 3: packages (about 330 MB on disk)" >&2
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -e . < /dev/null >&2
	@touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	@echo "Set-up 2 of 3: packages, with those of the tests (PyTorch among them: large)" >&2
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -e '.[dev]' < /dev/null >&2
	@touch .venv/core.stamp $@

# The compiled kernels are a convenience: without them the organism speaks from n-gram counts and compiles as it lives.
.venv/warm.stamp: $(KERNELS) .venv/core.stamp
	@echo "Set-up 3 of 3: compiling kernels (once; half a minute or so)" >&2
	@$(BIN)/python organism.py doctor --warm < /dev/null >&2 || $(BIN)/python -m organs.kernels warm < /dev/null >&2 \
		|| echo "The kernels could not be compiled now; the organism starts all the same." >&2
	@touch $@

# Tests of the giant read a real model where one can be had; without it they skip, and say so.
.venv/model.stamp: .venv/dev.stamp
	@echo "A small model for the tests of the giant (94 MB, once)" >&2
	@$(BIN)/python organism.py giant pull smollm2 < /dev/null >&2 && touch $@ \
		|| echo "It could not be fetched: those tests are skipped." >&2
