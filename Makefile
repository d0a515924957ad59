# make demo | test | test-all | pod | install | proto
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Freshly mapped pages are costly on virtual machines: let malloc keep and reuse what it has.
export MALLOC_ARENA_MAX := 1
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 100000000000
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export JAX_PLATFORMS ?= cpu
# Much of a test is one thread compiling; a file stays in one process, so that its fixtures are made once.
TWO_AT_A_TIME := -n 2 --dist loadfile

.PHONY: install demo test test-all pod proto clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/revseg demo

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(TWO_AT_A_TIME)

test-all: install
	$(BIN)/python -m pytest -m '' $(TWO_AT_A_TIME)

# The 3B's update for 64 chips that are not there; fails when it does not fit. The least effort halves the time.
pod: install
	JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1.0 $(BIN)/revseg compile --config configs/revseg_3b.yaml --topology v5p:4x4x4 --programs update

proto: install
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. revseg_jax/tracker/tracker.proto

clean:
	rm -rf $(VENV) build *.egg-info
