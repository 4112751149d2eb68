# make train              the main job: a small ResNet on handwritten digits, over all local devices
# make train-hosts        forty steps of it in two processes with two devices each
# make chaos              kills a run 20 times and compares it with an undisturbed one
# make test               all that CI runs: lint, types, and pytest with the newest and oldest versions
# make lint               ruff
# make types              the type checker
# make pytest             the tests, with the newest versions of what jaxbn needs (ARGS=tests/...)
# make pytest-oldest      those of the layers and functions, with the oldest
# make wheel              docstrings and guides where nothing but the wheel is installed, on both ends
# make foreign            jaxbn.surgery on the models of other packages, in an environment of its own
# make fuzz               random options, dtypes, devices and modes against the equations, for minutes
# make format             ruff's fixes and formatting
# make exactness          the README's comparison with Flax
# make house              how far a reader of the core has to go, into docs/design.md
# make experiments        published claims measured, docs/experiments/ (ARGS=faster for one)
# make compare-norms      every norm on Fashion-MNIST: batch sizes, depths, step times (ARGS=--long)
# make doctor-rates       how often jaxbn.diagnose is right: planted faults, and healthy networks
# make doctor-cost        what it costs: in training, and one diagnosis of a ResNet-18
# make bench              time and accuracy on this machine's CPU, beside other libraries
# make bench-step         whole training steps beside Flax's, on the device that is here
# make bench-fold         what folding batch norms saves on an H100, a TPU v5e and this machine's CPU
# make bench-compiled     what compiled programs cost on an H100 and a TPU v5e, with neither at hand
# make bench-trained      likewise on TPUs, of networks as wide as they are trained (ARGS="--targets v4")
# make bench-scaling      a step's cost on each of 4 to 1024 TPU chips, with none at hand, and a model
# make clean              removes the environments and all caches

CONFIG ?= configs/digits.py
ARGS ?=

VENV := .venv
comma := ,
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest
# The wheel alone, in empty environments, where all that is documented runs.
WHEEL := dist/jaxbn-0.1.0-py3-none-any.whl
WHEELS := .venv-wheel .venv-wheel-oldest
PAGES := README.md $(shell grep -l '```python' docs/*.md)

# Each process imports whole files, so that what a file's tests share is computed once.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Pages run with the oldest in `wheel`; how the code is laid out does not depend on versions.
OLDEST_TESTS := $(filter-out tests/test_readme.py tests/test_docs.py tests/test_folders.py \
  tests/test_package.py, $(wildcard tests/test_*.py)) tests/linen tests/nnx \
  tests/examples/test_checkpoints.py

# Where it is set, each of the many processes that tests start would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

# All create an environment and install what they need, at most once.
.PHONY: help train train-hosts chaos test wheel foreign fuzz exactness house experiments compare-norms \
        bench bench-step bench-fold bench-compiled bench-trained bench-scaling doctor-rates \
        doctor-cost lint types pytest pytest-oldest format clean $(WHEELS:=/run)
.DEFAULT_GOAL := help

# The lines that this file begins with.
help:
	@sed -n '/^#/!q;s/^# //p' $(firstword $(MAKEFILE_LIST))

train: $(INSTALLED)
	@$(BIN)/python -m examples.train --config=$(CONFIG) $(ARGS)

# So few that one process's numbers come out, within 1e-5: in hundreds of steps rounding grows.
HOSTS := --config.steps=40 --config.warmup_steps=10 --config.eval_every=20 --config.save_every=20
train-hosts: $(INSTALLED)
	@$(BIN)/python -m examples.launch 2 --config=$(CONFIG) --config.workdir=runs/hosts $(HOSTS) $(ARGS)

chaos: $(INSTALLED)
	@$(BIN)/python -m tests.examples.chaos $(ARGS)

# Installed at once: each leaves a core idle.
test:
	@$(MAKE) --no-print-directory -j 2 $(INSTALLED) $(OLDEST)/.installed
	@$(MAKE) --no-print-directory -j 2 wheel
	@$(MAKE) --no-print-directory lint types pytest pytest-oldest

lint: $(INSTALLED)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(INSTALLED)
	@$(BIN)/mypy

pytest: $(INSTALLED)
	$(call versions,newest,$(VENV))
	@$(BIN)/python $(PYTEST) $(ARGS)

pytest-oldest: $(OLDEST)/.installed
	$(call versions,oldest,$(OLDEST))
	@$(OLDEST)/bin/python $(PYTEST) $(or $(ARGS),$(OLDEST_TESTS))

wheel: $(WHEELS:=/run)

$(WHEELS:=/run): %/run: %/.installed
	@JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_NUM_CPU_DEVICES=4 $*/bin/python -P tests/bare.py --docstrings $(PAGES)
	@JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_NUM_CPU_DEVICES=1 $*/bin/python -P tests/bare.py $(shell grep -l device_count $(PAGES))

foreign: .venv-foreign/.installed
	@.venv-foreign/bin/python -m pytest tests/foreign $(ARGS)

fuzz: $(INSTALLED)
	@$(BIN)/python -m tests.fuzz $(ARGS)

format: $(INSTALLED)
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

exactness: $(INSTALLED)
	@$(BIN)/python -m benchmarks.exactness

house: $(INSTALLED)
	@$(BIN)/python -m benchmarks.house

experiments: $(INSTALLED)
	@$(BIN)/python -m experiments $(ARGS)

compare-norms: $(INSTALLED)
	@$(BIN)/python -m experiments.norms $(ARGS)
	@$(BIN)/python -m experiments.norms_report

doctor-rates: $(INSTALLED)
	@$(BIN)/python -u -m benchmarks.doctor_rates $(ARGS)

doctor-cost: $(INSTALLED)
	@$(BIN)/python -m benchmarks.doctor_cost

bench: .venv-bench/.installed
	@.venv-bench/bin/python -m benchmarks.speed
	@.venv-bench/bin/python -m benchmarks.numerics
	@.venv-bench/bin/python -m benchmarks.report

bench-step: .venv-bench/.installed
	@.venv-bench/bin/python -m benchmarks.step
	@.venv-bench/bin/python -m benchmarks.report

bench-fold: .venv-compiled/.installed
	@.venv-compiled/bin/python -m benchmarks.fold
	@.venv-compiled/bin/python -m benchmarks.report

bench-compiled: .venv-compiled/.installed
	@.venv-compiled/bin/python -m benchmarks.compiled
	@.venv-compiled/bin/python -m benchmarks.report

bench-trained: .venv-compiled/.installed
	@.venv-compiled/bin/python -m benchmarks.trained $(ARGS)
	@.venv-compiled/bin/python -m benchmarks.report

bench-scaling: .venv-compiled/.installed
	@.venv-compiled/bin/python -m benchmarks.scaling $(ARGS)
	@.venv-compiled/bin/python -m benchmarks.scaling_report

clean:
	rm -rf .venv* .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Newest first. What is newer than all that is tested, only where there is nothing else.
PYTHONS := 3.13 3.12 3.11 3.14 3

# $(call install,folder,packages,pythons,constraints): a virtual environment with these packages, made
# by the first of these Pythons that is on the PATH or one of pyenv's.
define install
	@python=$$(for v in $(3); do for p in python$$v "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$v.*/bin/python$$v; do \
	    "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break 2; done; done); \
	  [ -n "$$python" ] || { echo "make: Python 3.11 or later is missing: install it and run make again." >&2; exit 1; }; \
	  "$$python" -c 'import venv, ensurepip' 2>/dev/null || { echo "make: the venv module of $$python is missing: install it (Debian, Ubuntu: $$python-venv) and run make again." >&2; exit 1; }; \
	  version=$$("$$python" -V); \
	  [ "$$($(1)/bin/python -V 2>/dev/null)" = "$$version" ] || clear=--clear; \
	  echo "Installing into $(1), with $$version (once, a minute or more) ..."; \
	  "$$python" -m venv $$clear $(1) || { echo "make: $$python cannot create $(1)." >&2; exit 1; }; \
	  $(1)/bin/pip install --quiet --disable-pip-version-check --no-compile -c $(4) $(2) \
	    2>$(1)/install.log || { echo "make: pip could not install the packages, most likely for want of a network: $(1)/install.log says why." >&2; exit 1; }; \
	  touch $(1)/.installed
endef

# $(call versions,name,folder): what the tests run on.
define versions
	@$(2)/bin/python -c 'import platform; from importlib.metadata import version; \
	  names = "jax", "flax", "optax", "orbax-checkpoint"; \
	  print("The $(1) versions, in $(2): Python", platform.python_version(), *(f"{n} {version(n)}" for n in names))'
endef

$(INSTALLED): pyproject.toml constraints.txt
	$(call install,$(VENV),-e '.[examples$(comma)test]',$(PYTHONS),constraints.txt)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST),-e '.[examples$(comma)test]',3.11 3.12 3.13 3.14 3,constraints-oldest.txt)

$(WHEEL): pyproject.toml README.md $(shell find jaxbn -name '*.py') | $(INSTALLED)
	@rm -rf dist; $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w dist .

.venv-wheel/.installed: $(WHEEL)
	$(call install,.venv-wheel,$(WHEEL) --force-reinstall,$(PYTHONS),constraints.txt)

.venv-wheel-oldest/.installed: $(WHEEL)
	$(call install,.venv-wheel-oldest,$(WHEEL) --force-reinstall,3.11 3.12 3.13 3.14 3,constraints-oldest.txt)

# PyTorch is compared where it is installed: .venv-bench/bin/pip install torch
.venv-bench/.installed: pyproject.toml constraints.txt
	$(call install,.venv-bench,-e '.[bench]',$(PYTHONS),constraints.txt)

.venv-foreign/.installed: pyproject.toml constraints.txt
	$(call install,.venv-foreign,-e '.[foreign]',$(PYTHONS),constraints.txt)

.venv-compiled/.installed: pyproject.toml constraints.txt
	$(call install,.venv-compiled,-e '.[compiled]',$(PYTHONS),constraints.txt)
