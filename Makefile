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
BENCH_STAMP := .venv/bench.stamp
NATIVE_SOURCES := $(wildcard native/*.* native/*/*)
NATIVE_C := $(filter %.c %.h,$(NATIVE_SOURCES))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test pytest lint lint-c types format coverage mutants test-lowest test-newest dist \
	zoo sanitize sanitize-address sanitize-thread crash-campaign kill-campaign monitor-kill-campaign tear-campaign fuzz bench bench-compare clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

setup: $(ENGINE_STAMP) ## Install what is missing into .venv and build the extension

demo: setup ## Train a small GPT, kill it, resume it, compare the weights
	$(BIN)/python docs/examples/kill_and_resume.py

test: lint types pytest ## Lint, check types, run the tests

lint: setup lint-c ## Check style, formatting and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

lint-c: setup ## Check the style of native/ and the length of its functions
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_C)
	$(BIN)/lizard --languages c --length 70 --CCN 1000 --warnings_only native

zoo: build/zoo/zoo.stamp ## Train, kill and resume with many libraries, into docs/trainings.md: 5 minutes (SEED=)
	build/zoo/bin/python tests/zoo/zoo.py --seed $(SEED) --publish docs/trainings.md

types: setup ## Check types
	$(BIN)/python -m mypy

# A process for each core, and no more than four: most tests wait for the disk, or start processes of their own.
PYTEST := -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

pytest: setup
	$(BIN)/python $(PYTEST)

# A campaign's crash states, kills or rounds, and the one number that says which they are.
STATES ?= 1000000
KILLS ?= 5000
ROUNDS ?= 10000
SEED ?= 1
# How long each fuzz target, and `make mutants`, goes on; and a prefix of the mutations' names.
SECONDS ?= 600
ONLY ?=

crash-campaign: setup ## Try a million crash states (STATES=, SEED=)
	$(BIN)/python tests/support/crash_campaign.py --states $(STATES) --seed $(SEED)

kill-campaign: setup ## Kill a training 5000 times on four file systems (KILLS=, SEED=)
	$(BIN)/python tests/support/kill_campaign.py --kills $(KILLS) --seed $(SEED)

monitor-kill-campaign: setup ## The same with a monitor, killing either or both (KILLS=, SEED=)
	$(BIN)/python tests/support/kill_campaign.py --monitor --kills $(KILLS) --seed $(SEED)

tear-campaign: setup ## Write beside 10,000 saves at random moments, under every guard (ROUNDS=, SEED=)
	PYTHONPATH=. $(BIN)/python tests/support/tear_campaign.py --rounds $(ROUNDS) --seed $(SEED)

# Lines and branches of Python, those of processes that tests start included.  There is no threshold: a line that runs is
# not a line that is tested, which is what `make mutants` measures.
coverage: setup ## Run the tests and list the lines of Python that none runs
	rm -rf build/coverage && mkdir -p build/coverage
	-$(BIN)/python -m coverage run -m pytest -q
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage html --quiet
	$(BIN)/python -m coverage report

mutants: setup ## Change the code in small ways, and list the changes that no test notices (SECONDS=, SEED=, ONLY=)
	$(BIN)/python tests/mutants --seconds $(SECONDS) --seed $(SEED) --only "$(ONLY)"

bench: $(BENCH_STAMP) ## Measure the engine beside fio and its peers, into docs/perf.md: 20 minutes, 40 GB of disk
	$(BIN)/python -m engine.bench --publish docs

bench-compare: setup ## Say whether this tree is slower than another revision, beyond noise (BASE=)
	$(BIN)/python -m engine.bench.compare $(BASE)

format: setup ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE_C)

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

# What is not to be had here, fio or a peer, is a row of the benchmark that says so.
$(BENCH_STAMP): $(ENGINE_STAMP) .ci/prepare .ci/peers
	-.ci/prepare $(PYTHON) bench
	.ci/peers $(BIN)
	@touch $@

# -- Other versions, and the package that users get ------------------------------------------------------------------
#
# Environments of their own, with torch of their own.  The lowest versions are those that pyproject.toml declares; what it
# does not name is as in constraints.txt.

test-lowest: build/lowest/engine.stamp ## Run the tests with the lowest versions that pyproject.toml declares
	build/lowest/bin/python $(PYTEST)

test-newest: build/newest/engine.stamp ## Run the tests with the newest versions of everything
	build/newest/bin/python $(PYTEST)

build/lowest/engine.stamp: build/lowest.txt
build/newest/engine.stamp: build/newest.txt
build/lowest/engine.stamp build/newest/engine.stamp: build/%/engine.stamp: $(NATIVE_SOURCES) pyproject.toml
	$(PYTHON) -m venv build/$*
	build/$*/bin/python $(PIP_INSTALL) --upgrade --constraint build/$*.txt cffi cmake ninja scikit-build-core
	build/$*/bin/python $(INSTALL_ENGINE) ".[test]" --upgrade --constraint build/$*.txt
	@touch $@

build/lowest.txt: $(ENGINE_STAMP) constraints.txt .ci/lowest
	@mkdir -p build
	$(BIN)/python .ci/lowest constraints.txt >$@

# Made again on every run: what is newest changes without a change here.
.PHONY: build/newest.txt
build/newest.txt: $(ENGINE_STAMP)
	@mkdir -p build
	@: >$@

dist: setup ## Build source distribution and wheel into dist/, and check what is in them
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python .ci/check_dist dist

# -- Sanitizers ------------------------------------------------------------------------------------------------------
#
# An environment for each holds the extension built with ENGINE_SANITIZE, and sees the packages of .venv through a .pth
# file.  Python does not process .pth files it finds that way, so the plain build of .venv stays out of sight.  pytest
# leaves descriptor 2 alone (--capture=sys), so that a finding is seen though it ends the process.

SANITIZE_TESTS := $(wildcard tests/io/test_native*.py) tests/session/test_engine.py \
	tests/session/test_snapshot.py tests/monitor/test_serving.py
SITE_PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))

sanitize: sanitize-address sanitize-thread ## Run the tests that drive native code under ASan, UBSan and TSan

# ASan must be the first library of the process, and looks for the C++ throw of torch when it starts, so libstdc++ has
# to be there too.  Leaks are not looked for: CPython keeps memory until it exits.
sanitize-address: build/address/engine.stamp ## Only ASan and UBSan
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) libstdc++.so.6" ASAN_OPTIONS=detect_leaks=0 \
	    build/address/bin/python -m pytest --capture=sys $(SANITIZE_TESTS) tests/io/test_guard.py

# TSan's shadow memory wants the addresses where they are without randomisation.  It knows no fork of several threads
# that starts one, which is what the test left out does; and torch's threads are not ours to look at, so there are none.
# tests/io/test_guard.py is left out: its writers write memory that is being staged, and the page fault that orders them
# (userfaultfd) is no synchronisation that TSan knows, so it reports each of them as a race.
sanitize-thread: build/thread/engine.stamp ## Only TSan
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" OMP_NUM_THREADS=1 \
	    TSAN_OPTIONS="suppressions=tests/support/tsan.supp exitcode=66" \
	    setarch -R build/thread/bin/python -m pytest --capture=sys $(SANITIZE_TESTS) \
	    --deselect tests/io/test_native_lifecycle.py::test_a_fork_has_no_pipeline_and_harms_neither_process

# One of them tests the variant of bulk.c that hosts without AVX2 have, which make test does not see otherwise.
build/address/engine.stamp: BUILD_OPTIONS := ENGINE_SANITIZE="address;undefined" ENGINE_AVX2=OFF
build/thread/engine.stamp: BUILD_OPTIONS := ENGINE_SANITIZE=thread

build/%/engine.stamp: $(ENGINE_STAMP)
	$(BIN)/python -m venv build/$*
	$(BIN)/python -c '$(SITE_PACKAGES)' >"$$(build/$*/bin/python -c '$(SITE_PACKAGES)')/tools.pth"
	build/$*/bin/python $(INSTALL_ENGINE) . --no-deps $(BUILD_OPTIONS:%=--config-settings=cmake.define.%)
	@touch $@

# The same kind of environment, with the libraries of the trainings.
build/zoo/zoo.stamp: build/zoo/engine.stamp tests/zoo/requirements.txt
	build/zoo/bin/python $(PIP_INSTALL) --requirement tests/zoo/requirements.txt --constraint constraints.txt
	@touch $@

# -- Fuzzing -----------------------------------------------------------------------------------------------------------
#
# An environment of its own, as for the sanitizers, holds atheris and the engine, installed and not editable: atheris
# counts branches only of what Python's own loader loads.  What libFuzzer finds new is kept in build/fuzz/corpus from one
# run to the next; fuzz/corpus holds what a run starts from, and a finding is left in build/fuzz.

FUZZ := build/fuzz
FUZZ_TARGETS := manifest extra header directory
# SECONDS is of one target.  One input may take a minute and 2 GiB: far beyond what any does, torch and the sanitizers included.
FUZZ_LIMITS = -max_total_time=$(SECONDS) -timeout=60 -rss_limit_mb=2048 -artifact_prefix=$(FUZZ)/
FUZZ_AVX2 := $(filter x86_64,$(shell uname -m))
FUZZ_CFLAGS := -g -O1 -std=gnu11 -D_GNU_SOURCE -Inative -Wall -Wextra -fno-omit-frame-pointer \
	-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	$(if $(FUZZ_AVX2),-DENGINE_BULK_AVX2)
FUZZ_OBJECTS := $(patsubst native/%.c,$(FUZZ)/%.o,$(filter-out native/staging/bulk.c,$(wildcard native/*/*.c))) \
	$(FUZZ)/bulk_baseline.o $(if $(FUZZ_AVX2),$(FUZZ)/bulk_avx2.o)

fuzz: $(FUZZ_TARGETS:%=fuzz-%) fuzz-job ## Fuzz every target for ten minutes (SECONDS=)

.PHONY: fuzz-job $(FUZZ_TARGETS:%=fuzz-%)
$(FUZZ_TARGETS:%=fuzz-%): fuzz-%: $(FUZZ)/engine.stamp
	@mkdir -p $(FUZZ)/corpus/$* $(FUZZ)/scratch
	TMPDIR=$(FUZZ)/scratch $(FUZZ)/bin/python fuzz/run.py $* $(FUZZ_LIMITS) $(FUZZ)/corpus/$* fuzz/corpus/$*
	@rm -rf $(FUZZ)/scratch

fuzz-job: $(FUZZ)/job
	@mkdir -p $(FUZZ)/corpus/job
	$(FUZZ)/job $(FUZZ_LIMITS) $(FUZZ)/corpus/job fuzz/corpus/job

$(FUZZ)/tools.stamp: $(ENGINE_STAMP) .ci/prepare
	.ci/prepare $(PYTHON) fuzz
	$(BIN)/python -m venv $(FUZZ)
	{ $(BIN)/python -c '$(SITE_PACKAGES)'; pwd; echo "$$PWD/tests/support"; } \
	    >"$$($(FUZZ)/bin/python -c '$(SITE_PACKAGES)')/tools.pth"
	$(FUZZ)/bin/python $(PIP_INSTALL) --constraint constraints.txt atheris
	@touch $@

$(FUZZ)/engine.stamp: $(FUZZ)/tools.stamp $(wildcard engine/*.py engine/*/*.py) $(NATIVE_SOURCES)
	$(FUZZ)/bin/python $(PIP_INSTALL) --no-build-isolation --no-deps --force-reinstall .
	@touch $@

$(FUZZ)/job: fuzz/job.c $(FUZZ_OBJECTS)
	clang $(FUZZ_CFLAGS) $^ -luring -lpthread -o $@

$(FUZZ)/%.o: native/%.c $(FUZZ)/tools.stamp $(NATIVE_SOURCES)
	@mkdir -p $(@D)
	clang $(FUZZ_CFLAGS) -c $< -o $@

$(FUZZ)/bulk_%.o: native/staging/bulk.c $(FUZZ)/tools.stamp $(NATIVE_SOURCES)
	clang $(FUZZ_CFLAGS) $(if $(filter avx2,$*),-mavx2) -DENGINE_BULK_SUFFIX=_$* -c $< -o $@
