# make demo: the main job on a fresh machine.   make test: every test.   make bench: the figures beside the peers'.
# make agents: ten coding agents, installed from the registries, through every scenario (about 40 minutes).
# make test LITELLM=1.111.0: every test with that version of LiteLLM, in an environment of its own; test-fast, too.
PYTHON ?= python3
VENV = .venv$(LITELLM:%=-litellm-%)
BIN = $(VENV)/bin

.PHONY: demo test test-fast agents lint bench clean
.DEFAULT_GOAL = test-fast

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[embedded]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(if $(LITELLM),$(BIN)/pip install --quiet --disable-pip-version-check litellm==$(LITELLM))
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/biollm embedded pull
	$(BIN)/python examples/demo.py

test: $(if $(LITELLM),$(VENV)/.dev,lint)
	$(BIN)/python -m pytest

# What needs no Slurm, no vLLM, no Redis, no proxy and no browser.
test-fast: $(if $(LITELLM),$(VENV)/.dev,lint)
	$(BIN)/python -m pytest -n auto -m 'not real and not slow'

# Ten coding agents, and the scenario that takes minutes.
agents: $(VENV)/.dev
	BIOLLM_AGENTS=all BIOLLM_REQUIRE_REAL=1 $(BIN)/python -m pytest tests/real/test_agents.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

bench: $(VENV)/.dev
	PYTHONPATH=tests:tests/inputs $(BIN)/python tests/benchmarks/run.py

clean:
	rm -rf .venv .venv-litellm-* dist build
