# make train       the main job: a small ResNet on handwritten digits, over all local devices
# make test        everything that CI runs: ruff, the type checker, pytest
# make exactness   the README's comparison with Flax
# All create .venv and install what they need, at most once.

CONFIG ?= configs/digits.py
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train test exactness lint types pytest format clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

train: $(INSTALLED)
	@$(BIN)/python -m examples.train --config=$(CONFIG) $(ARGS)

test: lint types pytest

lint: $(INSTALLED)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(INSTALLED)
	@$(BIN)/mypy

pytest: $(INSTALLED)
	@$(BIN)/python -m pytest -n 2 $(ARGS)

format: $(INSTALLED)
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

exactness: $(INSTALLED)
	@$(BIN)/python -m benchmarks.exactness

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	@python=$$(for p in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done); \
	  [ -n "$$python" ] || { echo "make: Python 3.11 or later is missing: install it and run make again." >&2; exit 1; }; \
	  $$python -c 'import venv, ensurepip' 2>/dev/null || { echo "make: the venv module of $$python is missing: install it (Debian, Ubuntu: $$python-venv) and run make again." >&2; exit 1; }; \
	  echo "Installing into $(VENV) (once, about a minute) ..."; \
	  $$python -m venv $(VENV) || { echo "make: $$python cannot create $(VENV)." >&2; exit 1; }; \
	  $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[examples,test]' \
	    2>$(VENV)/install.log || { echo "make: pip could not install the packages, most likely for want of a network: $(VENV)/install.log says why." >&2; exit 1; }; \
	  touch $(INSTALLED)
