# Everything a developer runs.  Each target sets up what it needs, and is quick the second time.
#
#   make demo               with the Python that python3 is
#   make test PYTHON=python3.12

PYTHON ?= python3

BIN := .venv/bin
PIP_INSTALL := -m pip --disable-pip-version-check install --quiet
# Not isolated: the tools that build are in the environment already, at the versions constraints.txt says.
INSTALL_ENGINE := $(PIP_INSTALL) --no-build-isolation --config-settings=cmake.define.ENGINE_WERROR=ON --editable

# A stamp is a file whose age says when its step last succeeded.
TOOLS_STAMP := .venv/tools.stamp
ENGINE_STAMP := .venv/engine.stamp
NATIVE_SOURCES := $(wildcard native/*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test pytest lint types format sanitize crash-campaign clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(ENGINE_STAMP) ## Install what is missing into .venv and build the extension

demo: setup ## Train a small GPT, kill it, resume it, compare the weights
	$(BIN)/python docs/examples/kill_and_resume.py

test: lint types pytest ## Lint, check types, run the tests

lint: setup ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## Check types
	$(BIN)/python -m mypy

pytest: setup
	$(BIN)/python -m pytest

# A campaign's crash states, and the one number that says which they are.
STATES ?= 1000000
SEED ?= 1

crash-campaign: setup ## Try a million crash states (STATES=, SEED=)
	$(BIN)/python tests/crash_campaign.py --states $(STATES) --seed $(SEED)

format: setup ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove everything that make has made
	rm -rf .venv build dist runs .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(TOOLS_STAMP): constraints.txt .ci/prepare
	.ci/prepare $(PYTHON)
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt cffi cmake ninja scikit-build-core
	@touch $@

# Editable: Python's sources are read where they lie, and the compiled module from .venv.
$(ENGINE_STAMP): $(TOOLS_STAMP) pyproject.toml $(NATIVE_SOURCES)
	$(BIN)/python $(INSTALL_ENGINE) ".[test]" --constraint constraints.txt
	@touch $@

# -- Sanitizers ------------------------------------------------------------------------------------------------------
#
# An environment of its own holds the extension built with ENGINE_SANITIZE, and sees the packages of .venv through a
# .pth file.  Python does not process .pth files it finds that way, so the plain build of .venv stays out of sight.

SANITIZE := build/sanitize
SANITIZE_TESTS := tests/test_native.py tests/test_engine.py
# ASan must be the first library of the process, and looks for the C++ throw of torch when it starts, so libstdc++
# has to be there too.  Leaks are not looked for: CPython keeps memory until it exits.  pytest leaves descriptor 2
# alone (--capture=sys), so that a finding is seen though it ends the process.
SANITIZE_ENV = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) libstdc++.so.6" ASAN_OPTIONS=detect_leaks=0
SITE_PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))

sanitize: $(SANITIZE)/engine.stamp ## Run the tests that drive native code under ASan and UBSan
	$(SANITIZE_ENV) $(SANITIZE)/bin/python -m pytest --capture=sys $(SANITIZE_TESTS)

$(SANITIZE)/engine.stamp: $(ENGINE_STAMP)
	$(BIN)/python -m venv $(SANITIZE)
	$(BIN)/python -c '$(SITE_PACKAGES)' >"$$($(SANITIZE)/bin/python -c '$(SITE_PACKAGES)')/tools.pth"
	$(SANITIZE)/bin/python $(INSTALL_ENGINE) . --no-deps --config-settings=cmake.define.ENGINE_SANITIZE="address;undefined"
	@touch $@
