# Every target makes its own environment: a fresh machine needs python3 (3.11 or newer) and make, nothing else.
PYTHON ?= python3
VENV   ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo docs links rules deep rl bench brain worm test quick lint format types layers check hooks clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "etcompile needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp per extra, newer than pyproject.toml if that extra is installed as pyproject.toml asks.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo  ## learn handwritten digits online, and write pictures to out/
	$(BIN)/python tools/demo.py

rules: $(VENV)/.installed-rules  ## train every learning rule, and write docs/rules.md; RULES_ARGS="--quick" to try
	$(BIN)/python tools/rules $(RULES_ARGS)

deep: $(VENV)/.installed-rules  ## gradients in stacks of two to eight layers, for docs/deep.md; DEEP_ARGS="--quick" to try
	$(BIN)/python tools/rules/deep.py $(DEEP_ARGS)

rl: $(VENV)/.installed-train  ## agents that learn tasks of memory, for docs/reinforcement.md; RL_ARGS="--quick" to try
	$(BIN)/python tools/rl $(RL_ARGS)

bench: $(VENV)/.installed-bench  ## time and memory beside others, and write docs/benchmarks.md; BENCH_ARGS="--quick" to try
	$(BIN)/python tools/bench $(BENCH_ARGS)

brain: $(VENV)/.installed-brain  ## a brain of 127,400 spiking neurons learns, every synapse of it; BRAIN_ARGS="--scale 0.01" to try
	$(BIN)/python tools/brain $(BRAIN_ARGS)

worm: $(VENV)/.installed-worm  ## the same of the worm C. elegans, with the connectome of the package cect
	$(BIN)/python tools/brain --of worm --out out/worm $(BRAIN_ARGS)

test: $(VENV)/.installed-dev  ## all tests; PYTEST_ARGS="-k lstm" for some
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

quick: $(VENV)/.installed-dev  ## some tests of every folder, in two minutes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --quick $(PYTEST_ARGS)

# Four devices that are threads of one processor: a tutorial splits a network over them.
docs: $(VENV)/.installed-docs  ## the documentation site, with its tutorials run, in out/site
	XLA_FLAGS="--xla_force_host_platform_device_count=4 $(XLA_FLAGS)" MPLBACKEND=agg \
		$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs out/site
	@echo "the site: out/site/index.html"

links: $(VENV)/.installed-docs  ## whether links that lead away from the site still lead somewhere; needs a network
	$(BIN)/python -m sphinx --quiet -b linkcheck docs out/links

lint: $(VENV)/.installed-dev  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev  ## static types of the whole package
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

layers: $(VENV)/.installed-dev  ## who may import whom
	$(BIN)/lint-imports
	$(BIN)/python tools/check_layering.py

check: lint types layers test docs  ## all that CI runs

format: $(VENV)/.installed-dev  ## put the style right where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.installed-dev  ## install the git pre-commit hooks
	$(BIN)/pre-commit install

clean:  ## remove the environment, caches and outputs
	rm -rf $(VENV) build dist out docs/api docs/api.rst docs/learn docs/site docs/rules_reference.rst .hypothesis .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
