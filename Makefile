# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make their own
# environment (.venv) and touch nothing outside this folder.
#   PYTHON=python3.12   another Python, in an environment of its own (.venv-python3.12)
#   EXTRAS=dev,tpu      optional dependencies (default: dev, and gpu or tpu where there is one)
#   FAST=1              make demo: the three-minute glance
#   ARGS="-k rope -x"   make test, make slow: arguments for pytest
PYTHON ?=
EXTRAS ?=
VENV ?= .venv$(if $(PYTHON),-$(notdir $(PYTHON)))
BIN = $(VENV)/bin

.PHONY: help setup test slow lint format demo plan clean
help:  ## what can be made
	@sed -n '1,/^PYTHON/s/^# \{0,1\}//p' Makefile
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' Makefile

setup:  ## the environment both share; does nothing when it is up to date
	@launch/environment.sh "$(VENV)" "$(PYTHON)" "$(EXTRAS)"

test: setup lint  ## lint, types, tests
	$(BIN)/python -m pytest $(ARGS)

slow: setup  ## the tests, and the slow ones
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

lint: setup  ## ruff (lint and format) and the type checker
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/basedpyright --level error --pythonpath $(BIN)/python

format: setup  ## let ruff put the code in shape
	$(BIN)/ruff check --fix --quiet
	$(BIN)/ruff format --quiet

# On CPUs glibc would give each step's buffers back to the system and fault them in again: a quarter
# of the time (docs/training.md). Keep them.
demo: export MALLOC_MMAP_MAX_ = 0
demo: export MALLOC_TRIM_THRESHOLD_ = 8589934592
demo: export MALLOC_ARENA_MAX = 1
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
demo: setup  ## data, three stages, evaluation, PyTorch export and report: runs/demo/report.html
	$(BIN)/python -m launch.local $(if $(FAST),--fast)

plan: EXTRAS = dev,tpu
plan: setup  ## what the full sizes would need and do on TPU slices, compiled here: runs/plan.json
	@mkdir -p runs
	$(BIN)/python -m internvl_jax.plan --config=configs/plan.py --json=runs/plan.json --chart=runs/plan.png

clean:  ## remove environments and caches; runs/ and data stay
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
