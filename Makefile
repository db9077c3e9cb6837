# Two commands for a newcomer: `make demo` and `make test`. Each installs what it needs into .venv.
#   PYTHON=python3.12      the interpreter to build .venv with (3.11 or newer)
#   TORCH="torch"          what to install as PyTorch (default: the CPU pin in requirements/cpu.txt)
#   ARGS="--seeds 3"       passed on to `dvpa demo`, pytest or the benchmarks
#   WORKERS=2              processes that test side by side

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= -r requirements/cpu.txt
ARGS ?=
WORKERS ?= 2
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --root-user-action=ignore
STAMP := $(BIN)/.dvpa
# What meets Transformers most closely runs again on the oldest one that pyproject.toml allows.
ON_THE_FLOOR := answer attention batches chat checkpoint cli config configs \
    consolidate convert convert_formats demo detokenizer engine engine_route engine_schedule \
    engine_telemetry experts experts_interface export export_formats finetune finetune_inputs \
    fp8_convert fp8_engine fp8_loading growth lora model mtp mtp_checkpoint outcomes parity \
    pricing probe registration saving server_openai server_openai_errors speculation standalone \
    switches tokenizer training
SIDE_BY_SIDE = -n $(WORKERS)  # how tests are shared out: tests/conftest.py
INPUTS := pyproject.toml requirements/cpu.txt

.PHONY: help install demo test test-slow test-rehearsal test-floor lint format bench clean

help:
	@sed -n 's/^## //p' Makefile

## install     .venv with dvpa, its tests and its linters
install: $(STAMP)-dev

## demo        train nano on this CPU, calibrate it, answer requests, print the table -> runs/demo/
demo: $(STAMP)-run
	$(BIN)/dvpa demo $(ARGS)

## test        lint, then the tests that take seconds each
test: lint
	$(BIN)/python -m pytest tests/test_layering.py
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow" --durations=10 $(ARGS)

## test-slow   the tests that take minutes
test-slow: $(STAMP)-dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "slow and not rehearsal" --durations=0 $(ARGS)

## test-rehearsal  what CI has no time for: every ZeRO stage, a lost node, more kills
test-rehearsal: $(STAMP)-dev
	$(BIN)/python -m pytest -m rehearsal --durations=0 $(ARGS)

## test-floor  the tests that use the model, on the oldest Transformers that pyproject.toml allows
test-floor: $(STAMP)-floor
	PYTHONPATH=$(CURDIR)/.floor $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow" $(ON_THE_FLOOR:%=tests/test_%.py) $(ARGS)

## lint        ruff and mypy
lint: $(STAMP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## format      let ruff rewrite the sources
format: $(STAMP)-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## bench       the benchmarks behind the README's numbers
bench: $(STAMP)-run
	@shopt -s nullglob; for file in scripts/bench_*.py; do $(BIN)/python $$file $(ARGS); done

## clean       remove .venv and every output
clean:
	rm -rf $(VENV) .floor runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A broken half-made .venv must not survive: the stamp is written last, and only then trusted.
$(STAMP)-run: $(INPUTS)
	@python=$$(for name in $(PYTHON) python3.11 python3.12 python3; do \
	    "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	      && echo "$$name" && break; done) \
	  || { echo "make: no Python 3.11 or newer found; set PYTHON=..." >&2; exit 1; }; \
	test -x $(BIN)/python || "$$python" -m venv $(VENV)
	@echo "installing PyTorch and dvpa into $(VENV) (a few minutes the first time)"
	@$(PIP) $(TORCH)
	@$(PIP) --editable .
	@touch $@

$(STAMP)-dev: $(STAMP)-run
	@$(PIP) --editable '.[dev]'
	@touch $@

$(STAMP)-floor: $(STAMP)-dev requirements/floor.txt
	@$(PIP) --upgrade --no-deps --target .floor -r requirements/floor.txt
	@touch $@
