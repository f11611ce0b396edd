# Everything sets itself up: Python 3.11+, make and a C++ compiler are all that is assumed.
PYTHON ?= python3
VENV ?= .venv
PROCESSES ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: setup quickstart test test-long test-distributed test-all lint clean

setup: $(READY)

# torch first and by itself: the range picks a build that is at hand, before anything else can ask for another one.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.8,<2.14"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

quickstart: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus $(PROCESSES) launch/train.py --config configs/quickstart.yaml

test: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile

test-long: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m long

# Every stage, dtype, world and offload; fifty kill trials; every fault. Hours on two cores.
test-distributed: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/launches tests/faults

test-all: test test-long

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
