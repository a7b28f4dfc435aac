# `make train` and `make test` do everything on a machine with Python 3.11, git, make and a C++ compiler.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test test-slow bench check wheel clean

train: $(READY)
	$(BIN)/dpo-train

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Ratios to TRL, and what PDPO adds to a step, in some minutes on a quiet machine; docs/performance.md has all of it.
bench: $(READY)
	$(BIN)/python scripts/bench/step.py --case prompt-heavy response-heavy --side ours fair
	$(BIN)/python scripts/bench/scoring.py --case prompt-heavy --side ours fair
	$(BIN)/python scripts/bench/pdpo_step.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(READY)
	$(BIN)/python -m build --wheel

# Again whenever what is to be installed has changed; else this costs nothing.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) dist build
