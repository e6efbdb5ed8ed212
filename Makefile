# `make demo` and `make test` from a fresh clone; PYTHON=python3.12 names another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
EXTRAS := signal,speaker,encoders,zoo,evaluate,s3,codecs,ray,dev
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q --dist worksteal

.PHONY: demo test test-slow lint bench clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(PYTEST) -n $(JOBS) -m "not slow and not gpu"

test-slow: $(READY)
	$(PYTEST) -n $(JOBS) -m "slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# All benchmarks into docs/benchmarks.md (about an hour), or some: make bench SECTIONS="reads batches"
bench: $(READY)
	$(BIN)/python -m pip install --quiet -e ".[bench]" -c constraints.txt
	$(BIN)/python benchmarks/write.py $(SECTIONS)
	$(if $(SECTIONS),,$(BIN)/python benchmarks/f0.py --write)

clean:
	rm -rf $(VENV)

# torch goes first and by its exact version: a resolver left free takes a newer one with gigabytes beside it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "found: $$($(PYTHON) --version 2>/dev/null || echo 'no $(PYTHON)')"; \
	  echo "expected: Python 3.11 or newer"; \
	  echo "do: apt-get install python3 python3-venv, or make PYTHON=/path/to/python3.11 ..."; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "found: $(PYTHON) without venv and ensurepip"; \
	  echo "expected: both; the packages go into $(VENV)"; \
	  echo "do: apt-get install python3-venv"; exit 1; } >&2
	@command -v cc >/dev/null || { \
	  echo "found: no C compiler (cc)"; \
	  echo "expected: one, and Python's headers: pyworld and webrtcvad are built from source"; \
	  echo "do: apt-get install build-essential python3-dev"; exit 1; } >&2
	@$(PYTHON) -c 'import pathlib, sys, sysconfig; \
	  sys.exit(not (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").exists())' || { \
	  echo "found: $(PYTHON) without its headers (Python.h)"; \
	  echo "expected: them: pyworld and webrtcvad are built from source"; \
	  echo "do: apt-get install build-essential python3-dev"; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]" -c constraints.txt
	@touch $@
