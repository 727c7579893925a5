# Every target sets itself up: on a fresh machine with Python 3.11 or newer, `make demo` is all there is to type.
# A stamp in the virtual environment remembers which extras are installed, so that a second call goes straight to work.
#   make demo ARGS="--job samplers"     make test ARGS="tests/test_import.py"      make PYTHON=python3.13 test

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
# Neighbouring tests share what they compile: each worker gets half of the files, and takes from the other at the end.
PYTEST := $(PY) -m pytest -n 2 --dist worksteal
PIP := $(PY) -m pip install -qq --disable-pip-version-check --no-warn-conflicts

# The slice of the slow tests that `make test-slice` runs, of SLICES.
SLICE ?= 1
SLICES ?= 12
# What shows within a minute whether the package works with another Python and the releases that come with it.
THIN := tests/test_jax_canary.py tests/test_import.py tests/data/test_anndata.py tests/solving/test_closed_forms.py \
  tests/solving/test_one_time.py tests/solving/test_rules.py

.PHONY: demo test test-all test-slice test-thin bench lint docs clean
# Two pips in one environment would trip over each other.
.NOTPARALLEL:

demo: $(VENV)/.stamp-demo
	@$(PY) -m sdeflow demo $(ARGS)

test: $(VENV)/.stamp-test
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.stamp-test
	@$(PYTEST) $(ARGS)

test-slice: $(VENV)/.stamp-test
	@$(PYTEST) --slow-slice $(SLICE)/$(SLICES) $(ARGS)

test-thin: $(VENV)/.stamp-thin
	@$(PYTEST) -m "not slow" $(THIN) $(ARGS)

bench: $(VENV)/.stamp-bench
	@$(PY) -m benchmarks $(ARGS)

lint: $(VENV)/.stamp-lint
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/pyright
	@$(VENV)/bin/lint-imports

docs: $(VENV)/.stamp-docs
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "docs: site/index.html"

clean:
	@rm -rf .jax_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist site demo-output
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that `venv` puts in, so an interrupted creation is finished by the next call.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sdeflow needs Python 3.11 or newer; $(PYTHON) is older. Name another: make PYTHON=python3.12"; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

STAMP = @touch $@
SETUP := pyproject.toml Makefile | $(VENV)/bin/pip

# aeon goes in by itself, here and for the tests: its wheel carries the speech data, which is read as files. What it
# would bring along (numba, llvmlite, pandas: 300 megabytes) serves only code that is never imported.
$(VENV)/.stamp-demo: $(SETUP)
	@echo "installing sdeflow and what the demo needs"
	@$(PIP) -e ".[demo]"
	@$(PIP) --no-deps "aeon>=1.6"
	$(STAMP)

$(VENV)/.stamp-test: $(SETUP)
	@echo "installing sdeflow and what the tests need"
	@$(PIP) -e ".[test]"
	@$(PIP) --no-deps "aeon>=1.6"
	$(STAMP)

$(VENV)/.stamp-thin: $(SETUP)
	@echo "installing sdeflow and what a thin slice of the tests needs"
	@$(PIP) -e ".[single-cell]" "pytest>=8" "pytest-xdist>=3.6"
	$(STAMP)

# torch without its dependencies is right where the index serves a CPU wheel; the wheel for CUDA does not import
# without NVIDIA's libraries, and then they are fetched too.
$(VENV)/.stamp-bench: $(SETUP)
	@echo "installing sdeflow, torch, torchsde, diffusers and what aeon's classifiers need"
	@$(PIP) -e ".[plot,progress]" numba scikit-learn deprecated pandas filelock fsspec jinja2 networkx sympy typing-extensions boltons scipy trampoline "huggingface_hub<2" safetensors regex requests importlib_metadata pillow
	@$(PIP) --no-deps "aeon>=1.6" torch==2.13.0 torchsde diffusers
	@$(PY) -c "import torch" 2>/dev/null || $(PIP) torch==2.13.0
	$(STAMP)

$(VENV)/.stamp-lint: $(SETUP)
	@echo "installing the checkers"
	@$(PIP) -e ".[dev,demo,plot,progress,single-cell]"
	$(STAMP)

$(VENV)/.stamp-docs: $(SETUP)
	@echo "installing what the pages need"
	@$(PIP) -e ".[docs]"
	$(STAMP)
