# Two commands for a newcomer: `make demo` and `make test`. Each installs what it needs into .venv.
#   PYTHON=python3.12      the interpreter to build .venv with (3.11 or newer)
#   TORCH="torch"          what to install as PyTorch (default: the CPU pin in requirements/cpu.txt)
#   ARGS="--seeds 3"       passed on to `dvpa demo`, pytest or the benchmarks

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= -r requirements/cpu.txt
ARGS ?=
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --root-user-action=ignore
STAMP := $(BIN)/.dvpa
# Tests of files that never meet Transformers need no second run on an older one.
NO_MODEL := layering packaging calibrate policy report routing tier_map \
    group_cache pages sampling_params scheduler bench_engine bench_escalation \
    cpu_build cpu_kernel decode_layer dense_ops gpu_kernel latent_attention metrics route \
    triton_aot triton_kernel \
    bench_server checkpoints faults launchers scaling_docs server_config server_drift server_metrics server_telemetry \
    assemble assemble_failures assemble_kills assemble_report bench_training checkpoint_fp8 headers interpolate load_figure loggers \
    nodes per_expert recipe reliability
FLOOR_TESTS = $(filter-out $(NO_MODEL:%=tests/test_%.py),$(wildcard tests/test_*.py))
INPUTS := pyproject.toml requirements/cpu.txt

.PHONY: help install demo test test-slow test-floor lint format bench clean

help:
	@sed -n 's/^## //p' Makefile

## install     .venv with dvpa, its tests and its linters
install: $(STAMP)-dev

## demo        train nano on this CPU, calibrate it, answer requests, print the table -> runs/demo/
demo: $(STAMP)-run
	$(BIN)/dvpa demo $(ARGS)

## test        lint, then the tests that take seconds each
test: lint
	$(BIN)/python -m pytest -m "not slow" --durations=10 tests/test_layering.py tests $(ARGS)

## test-slow   the tests that take minutes
test-slow: $(STAMP)-dev
	$(BIN)/python -m pytest -m slow --durations=0 $(ARGS)

## test-floor  the tests that use the model, on the oldest Transformers that pyproject.toml allows
test-floor: $(STAMP)-floor
	PYTHONPATH=$(CURDIR)/.floor $(BIN)/python -m pytest -m "not slow" $(FLOOR_TESTS) $(ARGS)

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
