# make bench is the main job, make test all tests; both set up everything on a fresh Debian machine.
.DEFAULT_GOAL := help
SHELL := /bin/bash

# The first Python new enough, whatever provides it (Debian, pyenv, conda). Override: make PYTHON=/path/to/python3
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && exit; done; echo python3)
endif
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
FRACTION ?= 0.02
FUZZ_SECONDS ?= 60
BENCH_ARGS ?= --quick
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PATH := $(BIN):$(PATH)

PYTHON_BUILD := build/python
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
CXX_SOURCES = $(shell git ls-files '*.h' '*.cpp')
PY_SOURCES := flash_attn tests/python tests/metal_shim benchmarks examples

.NOTPARALLEL:

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

# ---- set-up

.PHONY: setup-build setup-test setup-neon setup-macos setup-lint
setup-build setup-test setup-neon setup-macos setup-lint: setup-%:
	@PYTHON='$(PYTHON)' scripts/setup_debian.sh $*

# Build tools live in .venv too, so that no build isolation is needed and a rebuild takes seconds.
$(VENV)/.requirements: pyproject.toml | setup-build
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	sed -n '/^requires = \[/,/^\]/s/^ *"\(.*\)",$$/\1/p' pyproject.toml > $(VENV)/build-requirements.txt
	$(PIP) install cmake ninja -r $(VENV)/build-requirements.txt
	touch $@

.PHONY: build
build: $(VENV)/.requirements ## Build into .venv, editable; fast when little has changed
	$(call install,[test$(,)bench])

# ---- jobs

.PHONY: bench
bench: build ## Benchmark against MLX's SDPA, PyTorch if installed, and the machine's ceilings
	$(BIN)/python benchmarks/benchmark_flash_attn_mlx.py $(BENCH_ARGS)

.PHONY: bench-peers
bench-peers: build ## Install PyTorch (large), ONNX Runtime and OpenVINO into .venv, so that make bench compares with them
	PYTHON=$(BIN)/python benchmarks/install_peers.sh

.PHONY: test
test: setup-test build test-python test-metal-shim test-metal test-cpp fuzz ## All tests, and a minute of fuzzing

.PHONY: test-python
test-python: build ## pytest tests/python
	$(BIN)/python -m pytest -q --ignore-glob='*/test_metal_*' tests/python

.PHONY: test-full
test-full: build ## A seeded share of upstream's whole test matrix: make test-full FRACTION=0.02
	FRACTION=$(FRACTION) $(BIN)/python -m pytest -q -m full tests/python

.PHONY: test-cpp
test-cpp: setup-test $(VENV)/.requirements ## The C++ tests of a release build
	$(call cpp_tests,release)

.PHONY: test-neon
test-neon: setup-neon $(VENV)/.requirements ## The C++ tests of the NEON level, cross-compiled, under qemu-user
	$(call cpp_tests,neon)

.PHONY: check-macos
check-macos: setup-macos build ## Whether all sources compile for arm64 by clang with libc++, as near to a Mac as Linux gets
	scripts/check_macos_syntax.sh

METAL_SHIM_BUILD := build/metal_shim

.PHONY: metal-shim
metal-shim: setup-test $(VENV)/.requirements ## Build the Metal shim, which runs the Metal kernels on the CPU
	cmake -G Ninja -B $(METAL_SHIM_BUILD) -D FLASH_ATTN_METAL_SHIM=ON -D Python_EXECUTABLE=$(BIN)/python --log-level=WARNING
	cmake --build $(METAL_SHIM_BUILD) --target metal_shim

.PHONY: test-metal-shim
test-metal-shim: metal-shim ## The Metal shim's own tests: MLX's kernels pass, planted bugs are found
	$(BIN)/python -m pytest -q tests/metal_shim/tests

# Two at a time: of the kernels' own tests every METAL_STEP-th and the one after, with every access checked; of the other suites
# every METAL_SUITE_STEP-th and the one after, on the Metal graph. 2 and 2 is all.
METAL_STEP ?= 4
METAL_SUITE_STEP ?= 24
METAL_SUITES := $(addprefix tests/python/test_,forward.py backward.py features.py varlen.py dropout.py lse.py nonfinite.py \
	transforms.py kvcache.py kvcache_decode.py kvcache_quantised.py kvcache_transforms.py paged_varlen.py)

.PHONY: test-metal
test-metal: build metal-shim ## The Metal kernels under the shim: a share of their own tests and of the others; all: METAL_STEP=2 METAL_SUITE_STEP=2
	@status=0; for part in 0 1; do \
	  ( $(BIN)/python -m pytest -q --share $$part/$(METAL_STEP) tests/python/test_metal_*.py && \
	    $(BIN)/python -m pytest -q --share $$part/$(METAL_SUITE_STEP) --metal-shim=fast $(METAL_SUITES) ) & jobs[$$part]=$$!; \
	done; for job in $${jobs[@]}; do wait $$job || status=1; done; exit $$status

.PHONY: metal-lint
metal-lint: build metal-shim ## Check the Metal texts: Metal's rules, address spaces, what a GPU compiler makes of them
	$(BIN)/python -m pytest -q tests/metal_shim/lint
	$(BIN)/python tests/metal_shim/lint

.PHONY: metal-report
metal-report: build metal-shim ## The work of the Metal kernels, beside what a call needs and MLX's own kernel
	$(BIN)/python -m pytest -q tests/metal_shim/report
	$(BIN)/python tests/metal_shim/report --json build/metal_report.json

.PHONY: metal-texts
metal-texts: build metal-shim ## Write the Metal texts to build/metal_texts, for xcrun metal -c on a Mac
	$(BIN)/python tests/metal_shim/lint/specialisations.py build/metal_texts

.PHONY: sanitize
sanitize: setup-test $(VENV)/.requirements ## The C++ tests under ASan + UBSan, then under TSan
	$(call cpp_tests,asan-ubsan)
	$(call cpp_tests,tsan)

.PHONY: fuzz
fuzz: setup-test $(VENV)/.requirements ## Fuzz the kernels under ASan + UBSan for FUZZ_SECONDS
	cmake --preset fuzz --log-level=WARNING -D FLASH_ATTN_AVX512=$(call cpu_has,avx512f)
	cmake --build --preset fuzz
	mkdir -p build/fuzz/corpus
	build/fuzz/tests/cpp/flash_attn_fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=600 -len_control=0 -print_final_stats=1 \
		-artifact_prefix=build/fuzz/ build/fuzz/corpus

.PHONY: lint
lint: setup-lint build ## clang-format, clang-tidy, ruff, mypy
	$(call install,[dev])
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/ruff check $(PY_SOURCES)
	$(BIN)/ruff format --check $(PY_SOURCES)
	$(BIN)/mypy flash_attn
	scripts/clang_tidy.sh $(PYTHON_BUILD) $(JOBS)

.PHONY: format
format: $(VENV)/.requirements ## Apply clang-format and ruff
	$(call install,[dev])
	$(BIN)/clang-format -i $(CXX_SOURCES)
	$(BIN)/ruff check --fix $(PY_SOURCES)
	$(BIN)/ruff format $(PY_SOURCES)

.PHONY: clean
clean: ## Remove build/ and .venv
	rm -rf build $(VENV)

, := ,

define install
	$(PIP) install --no-build-isolation -C build-dir=$(PYTHON_BUILD) -e '.$(1)'
endef

# Sanitized levels that this machine does not run are compiled for nothing.
cpu_has = $(shell grep -qsw $(1) /proc/cpuinfo && echo ON || echo OFF)

define cpp_tests
	cmake --preset $(1) --log-level=WARNING
	cmake --build --preset $(1)
	ctest --preset $(1)
endef
