# Everything sets itself up: Python 3.11+ and make are all that is assumed.
PYTHON ?= python3
VENV ?= .venv
PROCESSES ?= 2
# A pip constraints file, for the exact versions that were tested: CONSTRAINTS=constraints.txt
CONSTRAINTS ?=
# What test-fast runs: rooms whose tests compute on tiny tensors and files, in the tests' own process.
FAST := $(addprefix tests/,adapters checkpoint config/test_load.py config/test_renamed.py context/test_preflight.py data engine \
	evaluation/test_metrics.py methods objectives optim serving/test_rules.py test_layering.py test_plan.py test_run_folder.py \
	training/test_loop.py training/test_schedule.py)
BIN := $(VENV)/bin
READY := $(VENV)/ready$(if $(CONSTRAINTS),-constrained)
INSTALL := $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

# llama.cpp's converter and library come in the sources of this package. Compiling them takes some twenty minutes.
LLAMA_CPP_PYTHON ?= 0.3.36
SERVERS ?= $(VENV)/servers

.PHONY: setup quickstart bench bench-quick test test-fast test-long test-distributed test-servers test-slurm test-all lint constraints clean help

setup: $(READY)  ## install into .venv; CONSTRAINTS=constraints.txt takes the exact tested versions

# torch first and by itself: the range picks a build that is at hand, before anything else can ask for another one.
$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(INSTALL) "torch>=2.8,<2.14"
	$(INSTALL) --editable ".[dev]"
	touch $@

quickstart: $(READY)  ## train a tiny Llama on PROCESSES=2 processes, in about a minute
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus $(PROCESSES) launch/train.py --config configs/quickstart.yaml

# Seconds are worth something on an idle machine alone; bytes are exact anywhere.
bench: $(READY)  ## compare training steps with stock PEFT's; writes the tables of docs/benchmarks.md
	$(BIN)/python benchmarks/compare.py --out runs/bench --docs docs/benchmarks.md

bench-quick: $(READY)  ## the same for one case, in three rounds
	$(BIN)/python benchmarks/compare.py --out runs/bench-quick --quick

test: $(READY)  ## run the tests, in 9 to 16 minutes on two cores
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "not long and not servers and not slurm" -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(READY)  ## run the tests that start no launcher and no run, in under a minute
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "not long and not distributed and not servers" -n 2 --dist loadfile $(FAST)

test-long: $(READY)  ## run the long tests alone
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "long and not slurm"

# Every stage, dtype, world and offload; fifty kill trials; every fault. Hours on two cores.
test-distributed: $(READY)  ## run all distributed and fault tests, long or not
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/launches tests/faults

# Without a compiler the second half fails, and the tests that need it are skipped.
$(SERVERS)/ready: $(READY)
	mkdir -p $(SERVERS)/llama_cpp_python
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(SERVERS) llama-cpp-python==$(LLAMA_CPP_PYTHON)
	tar -xzf $(SERVERS)/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz -C $(SERVERS)/llama_cpp_python --strip-components 1
	-CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF" $(BIN)/python -m pip install --quiet --no-deps --target $(SERVERS)/site $(SERVERS)/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz diskcache
	touch $@

test-servers: $(SERVERS)/ready  ## compare adapters with llama.cpp's own code, which it downloads and compiles once
	SERVERS=$(SERVERS) $(BIN)/python -m pytest -m servers tests/servers

test-slurm: $(READY)  ## submit, interrupt and kill jobs on a Slurm cluster of two nodes, if there is one here
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m slurm tests/slurm

test-all: test test-long  ## run every test

lint: $(READY)  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two steps, so that a failing pip leaves the old file. `--all` adds setuptools, which torch needs at run time and which
# pip leaves out of a list on Python 3.11.
constraints: $(READY)  ## write constraints.txt from .venv; run lint and test first
	$(BIN)/python -m pip freeze --all --exclude-editable --exclude pip > $(VENV)/frozen.txt
	{ grep '^#' constraints.txt; sed 's/^\(torch==[^+]*\)+.*/\1/' $(VENV)/frozen.txt; } > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

clean:  ## remove .venv, build outputs and the tools' caches
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-18s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
