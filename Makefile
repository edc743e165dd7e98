# Every target sets itself up in .venv inside the checkout. Needed: Python 3.11 or newer, make, gcc.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-ssh test-all check bench clean
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

help: ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,tensorboard]'
	touch $@

# Tests of optional parts would be skipped without their packages.
.venv/ready-to-test: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[video,onnx,encoders]'
	touch $@

setup: .venv/ready ## install everything into .venv

demo: setup ## the whole chain on made-up street scenes, to a report, in minutes
	$(BIN)/nightseg run configs/demo.yaml

test: .venv/ready-to-test ## the default tests (some ten minutes on 2 cores)
	@# Two halves side by side: tests on Ray, which wait half of their time, with those of stages; all others. The output
	@# of the first comes last.
	@log=$$(mktemp); export OMP_NUM_THREADS=1; \
	{ env -u OMP_NUM_THREADS $(BIN)/python -m pytest -m "ray and not slow"; ray=$$?; \
	  $(BIN)/python -m pytest -m "not ray and not slow" tests/stages; exit $$((ray || $$?)); } >$$log 2>&1 & \
	$(BIN)/python -m pytest -m "not ray and not slow" --ignore=tests/stages; rest=$$?; \
	wait $$!; half=$$?; echo "On Ray, and stages:"; cat $$log; rm $$log; exit $$((rest || half))

test-slow: .venv/ready-to-test ## whole chains, kills and restarts; START_WITHIN=MINUTES names those that did not start by then
	$(BIN)/python -m pytest -m "slow and not ssh" -vv $(if $(START_WITHIN),--start-within $(START_WITHIN))

test-ssh: .venv/ready-to-test ## a cluster by `ray up` over SSH; skipped without root, sshd, rsync and iproute2
	$(BIN)/python -m pytest -m ssh -vv -rs

test-all: test test-slow test-ssh ## all tests

check: setup ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup ## benchmarks against named peers
	$(BIN)/python -m benchmarks

clean: ## remove what the targets made
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache
