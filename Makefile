# Two commands set everything up in .venv and run it:   make bench   make test
# `make gpu`, `make tune` and `make profile` use the Python on the PATH, with the torch and Triton it has: set PYTHON to
# choose another.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
# Whose torch `make wheel` tries the wheel with: any from 2.11 on.
INTERPRETER ?= $(BIN)/python
# Of `make test`: processes, with a thread each.
JOBS ?= 2
# Of `make gpu`: convolutions, networks or tuning.
ROUND ?= convolutions
# Of `make tune`: its arguments, such as OPTIONS="--layers regnety_040 --batch 128 --seconds 600".
OPTIONS ?=
# Of `make profile`: one kernel, of one pass of one layer, as `benchmarks/grouped_conv.py --list` names them.
LAYER ?= 128x56x56_s1_gw4
PASS ?= fwd
BATCH ?= 256
BACKEND ?= triton
BIN := $(VENV)/bin
# Named versions keep pip from taking another torch along with some dependency.
TORCH ?= torch==2.13.0 torchvision==0.28.0
TRITON ?= triton==3.6.0
# GCC's; the CPU kernels are compiled with them by `make sanitize`. (With them GCC 12's SLP vectorizer crashes.)
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer \
	-fno-tree-slp-vectorize
SANITIZED := build/sanitized
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: dev lint test sanitize wheel bench gpu tune profile clean

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
	$(BIN)/python -m pytest tests --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# The CPU kernels' tests under the address and undefined-behaviour sanitizers; building takes minutes.
sanitize: dev
	CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" RESNEXT_BUILD_CUDA=0 \
		$(BIN)/python setup.py -q build --build-base $(SANITIZED)-objects --build-lib $(SANITIZED)
	cp -r tests pyproject.toml $(SANITIZED)
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		$(abspath $(BIN))/python -m pytest tests/test_bindings.py tests/test_extension.py tests/test_extension_fused.py \
		tests/test_layouts.py tests/test_winograd.py tests/test_attention.py

# By way of the source distribution, so that nothing left over in build/ gets in.
wheel: dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m tests.wheel dist/*.whl --interpreter $(INTERPRETER)

bench: dev
	$(BIN)/python benchmarks/grouped_conv.py --quick

gpu:
	$(PYTHON) benchmarks/gpu_round.py $(ROUND) --out $(OUT)

tune:
	$(PYTHON) benchmarks/tune.py $(OPTIONS)

# Everything Nsight Compute can tell about one launch; opens in ncu-ui, or `ncu --import` prints it.
profile:
	@command -v ncu >/dev/null || { echo "make profile: needs Nsight Compute (ncu, of the CUDA toolkit) on the PATH" >&2; exit 2; }
	mkdir -p $(OUT)
	ncu --set full --kernel-name "regex:grouped_conv|tensor_core|direct" --launch-count 1 --force-overwrite \
		--export $(OUT)/$(LAYER)_$(PASS)_$(BACKEND) \
		$(PYTHON) benchmarks/grouped_conv.py --verify-only --device cuda --layers $(LAYER) --passes $(PASS) \
		--batch $(BATCH) --backend $(BACKEND)

clean:
	rm -rf build dist *.egg-info out resnext/_C*.so $(VENV)/.installed
