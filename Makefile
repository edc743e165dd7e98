# Every target sets itself up in .venv inside the checkout. Needed: Python 3.11 or newer, make, gcc.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check bench clean
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

help: ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,tensorboard]'
	touch $@

setup: .venv/ready ## install everything into .venv

demo: setup ## the whole chain on made-up street scenes, to a report, in minutes
	$(BIN)/nightseg run configs/demo.yaml

test: setup ## the default tests (a few minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow"

test-all: setup ## all tests, whole chains, kills and restarts included
	$(BIN)/python -m pytest

check: setup ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup ## benchmarks against named peers
	$(BIN)/python -m benchmarks

clean: ## remove what the targets made
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache
