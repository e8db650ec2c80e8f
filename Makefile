# Two commands set everything up in .venv and run it:   make bench   make test
# `make gpu` uses the Python on the PATH, with the torch and Triton it has: set PYTHON to choose another.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
# Whose torch `make wheel` tries the wheel with: any from 2.11 on.
INTERPRETER ?= $(BIN)/python
# Of `make gpu`: convolutions or networks.
ROUND ?= convolutions
BIN := $(VENV)/bin
# Named versions keep pip from taking another torch along with some dependency.
TORCH ?= torch==2.13.0 torchvision==0.28.0
TRITON ?= triton==3.6.0
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: dev lint test wheel bench gpu clean

dev: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja "numpy<2.4" $(TORCH)
	touch $@

# CUDA builds of torch bring their Triton; beside a CPU build it is for checking the GPU kernels, and may be missing.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test,dev]'
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON) || true
	touch $@

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: dev
	$(BIN)/python -m pytest tests

# By way of the source distribution, so that nothing left over in build/ gets in.
wheel: dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m tests.wheel dist/*.whl --interpreter $(INTERPRETER)

bench: dev
	$(BIN)/python benchmarks/grouped_conv.py --quick

gpu:
	$(PYTHON) benchmarks/gpu_round.py $(ROUND) --out $(OUT)

clean:
	rm -rf build dist *.egg-info out resnext/_C*.so $(VENV)/.installed
