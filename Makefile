# Everything runs in .venv, made from the pinned lock on first use.
#   make demo      the main job on the built-in models: no GPU, no download of models or data
#   make test      the tests           make test-all   and the slow ones
#   make check     ruff and mypy       make clean      forget the environment

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check --no-deps
# The lock asks for torch's CPU build: from the configured indexes where they have it, else from PyTorch's own.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH = $(shell grep '^torch==' requirements/cpu.lock)
# The stamp's name is the digest of what the environment is made from: it is made anew when that changes.
STAMP := .venv/.ready-$(shell cat requirements/cpu.lock pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: demo test test-all check format clean env
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@rm -rf runs/demo
	$(BIN)/almost-eval hhh --protocol reward --output runs/demo/hhh-reward
	$(BIN)/almost-eval hhh --output runs/demo/hhh
	$(BIN)/almost-eval truthfulqa --output runs/demo/truthfulqa
	$(BIN)/almost-eval mmlu --output runs/demo/mmlu

test: $(STAMP)
	$(BIN)/python -m pytest

test-all: $(STAMP)
	$(BIN)/python -m pytest -m ""

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv --clear .venv
	@echo "setting up .venv from requirements/cpu.lock: some minutes, once"
	@$(PIP) $(TORCH) 2>/dev/null || $(PIP) --index-url $(TORCH_CPU_INDEX) $(TORCH)
	@$(PIP) --requirement requirements/cpu.lock
	@$(PIP) --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache
