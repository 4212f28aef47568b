# Everything runs in .venv, made from the pinned lock on first use.
#   make demo      the main job on the built-in models: no GPU, no download of models or data
#   make test      the tests           make test-all   and the slow ones
#   make test-browser  the demo in a real chromium (Debian's, installed with apt where that can be done)
#   make check     ruff and mypy       make clean      forget the environment

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check --no-deps
# The lock asks for torch's CPU build: from the configured indexes where they have it, else from PyTorch's own.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH = $(shell grep '^torch==' requirements/cpu.lock)
# The stamp's name is the digest of what the environment is made from: it is made anew when that changes.
STAMP := .venv/.ready-$(shell cat requirements/cpu.lock pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: demo test test-all test-browser check format clean env
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@rm -rf runs/demo
	$(BIN)/almost-eval all --output runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-all: $(STAMP)
	$(BIN)/python -m pytest -m ""

# Without chromium and without the right to install it, the tests are skipped and say why.
test-browser: $(STAMP)
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
	  >/dev/null 2>&1 || echo "chromium could not be installed: the browser tests will be skipped" >&2
	$(BIN)/python -m pytest tests/browser -m browser

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/make_cli_reference.py --check

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
