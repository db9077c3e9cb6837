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
# Files that need no second run on an older Transformers: they never meet it, or only by way of the
# model, the tokenizer, the engine and the recipe, whose own tests are run again.
OFF_THE_FLOOR := layering packaging calibrate policy report routing tier_map tasks examples mixture \
    calibration_text group_cache pages sampling_params scheduler bench_engine bench_escalation \
    bench_kernels bench_server bench_training cpu_build cpu_kernel decode_layer dense_ops gpu_kernel \
    latent_attention metrics route router triton_aot triton_kernel sampler escalation fused_steps \
    checkpoints faults launchers scaling_docs dashboard residency engine_residency engine_async \
    engine_failures plan_measured train_plan server_config server_drift server_metrics \
    server_telemetry server_drain server_limits server_lm_eval server_ray server_schema \
    server_security server_api assemble assemble_failures assemble_mergekit checkpoint_fp8 headers \
    interpolate convert_failures load_figure loggers logs nodes per_expert recipe reliability \
    prepare packed parallel finetune_parallel start start_memory host_memory loss_chunks mtp_training
FLOOR_TESTS = $(filter-out $(OFF_THE_FLOOR:%=tests/test_%.py),$(wildcard tests/test_*.py))
# A file's tests stay in one process; those that start processes of their own, one after the other.
SIDE_BY_SIDE = -n $(WORKERS) --dist loadgroup
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
	$(BIN)/python -m pytest tests/test_layering.py
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow" --durations=10 $(ARGS)

## test-slow   the tests that take minutes
test-slow: $(STAMP)-dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m slow --durations=0 $(ARGS)

## test-floor  the tests that use the model, on the oldest Transformers that pyproject.toml allows
test-floor: $(STAMP)-floor
	PYTHONPATH=$(CURDIR)/.floor $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow" $(FLOOR_TESTS) $(ARGS)

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
