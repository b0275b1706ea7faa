# From a bare machine with make and python3 to everything that is done here daily. `make` alone lists the targets.

PYTHON    ?= python3
VENV      ?= .venv
TORCH     ?= torch>=2.10
EXTRAS    ?= demo,test,bench,lint
PIP_FLAGS ?=
ARGS      ?=

PY := $(VENV)/bin/python
# What the installed package is made from: a change in any of these installs it again.
SOURCES := pyproject.toml setup.py build_backend.py CMakeLists.txt $(shell find csrc -type f)
SHELL_FILES := .ci/run $(shell find bench -name '*.sh')
# The C++ that needs neither torch nor CUDA, as one instruction set compiles it.
TIDY_FILES := $(wildcard csrc/plan/*.cpp csrc/cpu/*.cpp csrc/simt/host/*.cpp)
TIDY_FLAGS := -std=c++20 -DLDMI_ISA=baseline -DLDMI_VECTOR_BYTES=16
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Threads that sleep while they wait instead of spinning: on a machine that does other work too, PyTorch's
# training is several times faster so. Not for the benchmark, which wants the machine for itself.
demo test: export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv install demo test bench bench-check gpu lint format clean distclean FORCE

help: ## this list
	@echo 'Targets:'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'Variables (make test PYTHON=python3.12):'
	@echo '  PYTHON       the Python that $(VENV) is made with, 3.10 or later    [$(PYTHON)]'
	@echo '  VENV         folder of the virtual environment                   [$(VENV)]'
	@echo '  TORCH        requirement for torch, such as torch==2.13.0        [$(TORCH)]'
	@echo '  EXTRAS       extras of pyproject.toml to install                 [$(EXTRAS)]'
	@echo '  PIP_FLAGS    more flags for pip, such as --index-url URL         [$(PIP_FLAGS)]'
	@echo '  ARGS         arguments for the command, such as ARGS=--quick     [$(ARGS)]'

install: $(VENV)/.installed ## virtual environment with the package (editable), built for its torch

venv: install ## the same

demo: install ## train on wrong labels with cross entropy and with L_DMI; ends with a table and a picture
	$(PY) -m bench.experiments.demo $(ARGS)

test: install ## the test suite
	$(PY) -m pytest $(ARGS)

bench: install ## time the loss against its peers on this CPU; writes bench/results/
	$(PY) -m bench.kernels.run $(ARGS)

bench-check: install ## time it again and fail where it became slower than the committed result says
	$(PY) -m bench.kernels.check $(ARGS)

# With the Python that is there, whose torch is for this GPU, and no network: bench/gpu/run.sh says what its variables are.
gpu: ## on a machine with an NVIDIA GPU: build in place, test, sanitize, measure; ARGS names parts
	PYTHON=$(PYTHON) bench/gpu/run.sh $(ARGS)

lint: install ## linters, types, layers, spelling, clang-tidy; changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/codespell .
	$(VENV)/bin/shellcheck $(SHELL_FILES)
	$(if $(CXX_FILES),$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES))
	$(VENV)/bin/clang-tidy --quiet $(TIDY_FILES) -- $(TIDY_FLAGS)

format: install ## ruff and clang-format, rewriting the files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(if $(CXX_FILES),$(VENV)/bin/clang-format -i $(CXX_FILES))

clean: ## remove what builds and tests leave; the next make installs again
	rm -rf build dist *.egg-info ldmi_fast/_C*.so $(VENV)/.installed
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find bench ldmi_fast tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## the virtual environment and the demo's results too
	rm -rf $(VENV) demo-results

$(VENV)/.created:
	@command -v $(PYTHON) > /dev/null || { echo "error: there is no $(PYTHON): install Python 3.10 or later, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), expected 3.10 or later: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(PY) -m pip install --upgrade pip
	@touch $@

# Rewritten only when it changes, so that another TORCH or EXTRAS installs again.
$(VENV)/.settings: $(VENV)/.created FORCE
	@echo '$(TORCH) $(EXTRAS) $(PIP_FLAGS)' | cmp -s - $@ || echo '$(TORCH) $(EXTRAS) $(PIP_FLAGS)' > $@

# torch first: the package is then built against its headers. It is named again, so that nothing replaces it.
$(VENV)/.installed: $(VENV)/.settings $(SOURCES)
	$(PY) -m pip install $(PIP_FLAGS) '$(TORCH)'
	$(PY) -m pip install $(PIP_FLAGS) '$(TORCH)' --editable '.[$(EXTRAS)]'
	@touch $@
