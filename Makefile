# Everything runs in .venv, made from the pinned lock on first use.
#   make demo      the main job on the built-in models: no GPU, no download of models or data
#   make test      the tests, on two cores (JOBS=2)     make test-all   all tests: some two hours more
#   make test-real     the tests on two real models (MODELS=DIR, default runs/models), made when absent
#   make real      ALMoST on the two real models in a quarter of an hour, and a page (docs/real-models.md)
#   make test-browser  the demo in a real chromium (Debian's, installed with apt where that can be done)
#   make check     ruff and mypy       make clean      forget the environment

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check --no-deps
# The lock asks for torch's CPU build: from the configured indexes where they have it, else from PyTorch's own.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH = $(shell grep '^torch==' requirements/cpu.lock)
# The stamp's name is the digest of what the environment is made from: it is made anew when that changes.
STAMP := .venv/.ready-$(shell cat requirements/cpu.lock pyproject.toml | cksum | cut -d' ' -f1)

# The real models of `make test-real`, and the program that makes them: `python REAL_MODELS_MAKER MODELS NAME...`
MODELS ?= runs/models
REAL_MODELS_MAKER ?= $(wildcard ../shared/real_models/make.py)
SMOLLM2 := smollm2-135m-instruct
GEMMA := gemma-3-270m
REAL_TESTS = ALMOST_REAL_MODELS=$(abspath $(MODELS)) $(BIN)/python -m pytest -m "real and not slow" -rs
# $(call make_models,NAMES): makes those that are not there, each in a scratch folder first, or says what to put where.
define make_models
@for name in $(1); do \
  [ ! -f "$(MODELS)/$$name/config.json" ] || continue; \
  [ -n "$(REAL_MODELS_MAKER)" ] || { echo "error: no $(MODELS)/$$name; put that checkpoint there, name the folder that" \
    "holds $(SMOLLM2) and $(GEMMA) with MODELS=DIR, or what makes them with REAL_MODELS_MAKER=FILE" >&2; exit 2; }; \
  echo "making $(MODELS)/$$name: one to three minutes, once"; \
  rm -rf "$(MODELS)/.unfinished" && $(BIN)/python "$(REAL_MODELS_MAKER)" "$(MODELS)/.unfinished" "$$name" && \
  mv "$(MODELS)/.unfinished/$$name" "$(MODELS)/$$name" && rmdir "$(MODELS)/.unfinished" || \
  { echo "error: $(REAL_MODELS_MAKER) could not make $(MODELS)/$$name; put that checkpoint there" >&2; exit 1; }; \
done
endef

.PHONY: demo real test test-all test-real test-real-quick test-browser check format clean env
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@rm -rf runs/demo
	$(BIN)/almost-eval all --output runs/demo

test: $(STAMP)
	$(BIN)/python tests/side_by_side.py $(JOBS)

test-all: $(STAMP)
	ALMOST_REAL_MODELS=$(abspath $(MODELS)) $(BIN)/python -m pytest -m "" -rs

test-real: $(STAMP)
	$(call make_models,$(SMOLLM2) $(GEMMA))
	@echo "the tests on real models: some ten minutes on two cores, beside making the models"
	$(REAL_TESTS)

# A few on the smaller model: two minutes, and one more to make it.
test-real-quick: $(STAMP)
	$(call make_models,$(SMOLLM2))
	$(REAL_TESTS) tests/almost_eval/tasks/test_real_models.py -k smollm2

# The method on real models: few prompts, adapters. DATA_ROOT holds hub/, alpaca_eval/ and hh_rlhf/.
DATA_ROOT ?= $(wildcard ../shared/data)
REAL_OUTPUT ?= runs/real-quick
real: $(STAMP)
	$(call make_models,$(SMOLLM2) $(GEMMA))
	@[ -n "$(DATA_ROOT)" ] || { echo "error: no data; name the folder that holds hub, alpaca_eval and hh_rlhf with" \
	  "DATA_ROOT=DIR (docs/real-models.md says what is in it)" >&2; exit 2; }
	@echo "the method on real models in its small form: a quarter of an hour on two quiet cores, 10 GiB; a second run goes on"
	$(BIN)/python -m benchmarks.real_world --form quick --data-root "$(DATA_ROOT)" --models "$(MODELS)" \
	  --output "$(REAL_OUTPUT)"
	@echo "the page: $(REAL_OUTPUT)/page.html"

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
