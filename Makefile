# make demo: the main job on a fresh machine.   make test: every test.   make bench: the figures beside the peers'.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-fast lint bench clean
.DEFAULT_GOAL = test-fast

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[embedded]'
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ .venv/.demo

demo: .venv/.demo
	$(BIN)/biollm embedded pull
	$(BIN)/biollm complete "Why did this Nextflow run fail? Answer in two sentences." -f examples/nextflow_oom.log

test: lint
	$(BIN)/python -m pytest

# What needs no Slurm, no vLLM, no proxy and no browser.
test-fast: lint
	$(BIN)/python -m pytest -m 'not real and not slow'

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

bench: .venv/.dev
	PYTHONPATH=tests $(BIN)/python tests/benchmarks/run.py

clean:
	rm -rf .venv dist build
