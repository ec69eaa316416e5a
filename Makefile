# lorasweep: `make demo` and `make test` do everything from a fresh clone; `make help` lists the rest.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
# No mark of an environment is a mere step to another, to be removed.
.SECONDARY:

# What a login shell sets for other Pythons.
unexport PYTHONPATH PYTHONHOME
# As in jobs: torch cannot be imported from a folder whose name the shell's language has no letters for.
export PYTHONUTF8 := 1

# Homes have quotas, or cannot be written to.
export XDG_CACHE_HOME := $(CURDIR)/.venv/cache

PYTHON ?= python3
CORES ?= $(shell nproc)
VENV := .venv
BIN := $(VENV)/driver/bin
STAGES := driver train eval
# `make test` leaves out what is marked as long, and `make test-all` runs that as well.
SELECT ?= -m "not long"
PYTEST = -m pytest -q -p no:cacheprovider $(SELECT)

# A prerequisite that is always newer.
.PHONY: always

.PHONY: help install install-vllm install-test demo test test-all lint unit unit-driver unit-train unit-eval workflow e2e e2e-trained e2e-finished e2e-matrices browser slurm gpu docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAGES:%=$(VENV)/%/package)  ## make the environments of the driver, of training and of evaluation

install-vllm: $(VENV)/vllm/package  ## make the environment of evaluation.backend: vllm, which needs a GPU (10 GB)

MAKE_VENV = "$(PYTHON)" scripts/make_venv.py

# Which Python environments are made of, if one was named: another one makes them anew.
$(VENV)/python: $(if $(filter-out file undefined,$(origin PYTHON)),always)
	@mkdir -p $(VENV)
	@"$(PYTHON)" -c 'import os, sys; print(os.path.realpath(sys._base_executable))' > $@.new
	@if cmp --quiet $@.new $@; then rm $@.new; else mv $@.new $@; fi

# An environment is made anew of its pins; the mark is written last, so an interrupted install is repeated.
$(VENV)/%/installed: envs/%.txt $(VENV)/python
	@$(MAKE_VENV) $(VENV)/$* -r envs/$*.txt

# Environments can be made beside each other once the first has what Python may lack to make any, and uv. Not so the
# package: each of its installations writes `lorasweep.egg-info`.
$(VENV)/train/installed $(VENV)/eval/installed $(VENV)/vllm/installed: | $(VENV)/driver/installed
$(VENV)/train/package: | $(VENV)/driver/package
$(VENV)/eval/package: | $(VENV)/train/package

# The package itself, so that the commands which Snakemake prints can be pasted, and Inspect finds its entry points.
$(VENV)/%/package: pyproject.toml $(VENV)/%/installed
	@$(MAKE_VENV) --add $(VENV)/$* --no-deps --editable .
	@touch $@

install-test: $(STAGES:%=$(VENV)/%/installed-test)

# What the tests of all environments need, and what those of this one do beside it.
$(VENV)/%/installed-test: envs/test.txt $(wildcard envs/test-*.txt) $(VENV)/%/package
	@echo "Installing what tests need into $(VENV)/$* ..."
	@$(MAKE_VENV) --add $(VENV)/$* -r envs/test.txt $(patsubst %,-r %,$(wildcard envs/test-$*.txt))
	@touch $@

demo: install  ## train SmolLM2-135M at four ranks on this machine, and print the table
	@$(VENV)/eval/bin/python demo/prepare.py
	@$(BIN)/snakemake --configfile config/demo.yaml --cores $(CORES)
	@$(BIN)/lorasweep show config/demo.yaml

# Where tests leave how many could not run, and how long each took.
export LORASWEEP_TESTS = $(CURDIR)/$(VENV)/tests

test:  ## set up, then run every check and test but the long ones
	@$(MAKE) --no-print-directory --jobs=2 install-test
	@rm -rf $(VENV)/tests && mkdir $(VENV)/tests
	@echo "Running checks and tests beside each other; what each says comes when it ends ..."
	@# The SLURM tests mostly wait: so they begin first, and three of the others run beside them, the longest first.
	@status=0; $(MAKE) --no-print-directory --keep-going --jobs=4 --output-sync=target \
		slurm e2e unit-eval workflow unit-driver unit-train browser lint || status=$$?; \
	echo "The ten slowest tests, in seconds:"; sort -rn $(VENV)/tests/durations | head; \
	awk '{ran += $$1; not += $$2} END {print ran + 0, "tests ran;", not + 0, "could not run on this machine, for the reasons above"}' \
		$(VENV)/tests/counts; exit $$status

test-all:  ## the same with the long tests: every test there is but those that need a GPU
	@$(MAKE) --no-print-directory test SELECT=

lint: install-test  ## check style, formats, types and the workflow's own lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/mypy
	$(BIN)/snakemake --lint

unit: unit-driver unit-train unit-eval  ## test the package, each stage in its environment

unit-driver: install-test
	$(BIN)/python $(PYTEST) tests/unit

unit-train: install-test
	$(VENV)/train/bin/python $(PYTEST) tests/train

unit-eval: install-test
	$(VENV)/eval/bin/python $(PYTEST) tests/eval

workflow: install-test  ## test plans, job counts and bad input, without running a job
	$(BIN)/python $(PYTEST) tests/workflow

e2e: e2e-finished e2e-matrices e2e-trained  ## test real runs on a tiny model

# Apart, to run beside each other: those that look at one finished sweep, the large matrices, and the others.
E2E_TRAINED := $(patsubst %,tests/e2e/test_%.py,direct founding hub interruption quantized resume storage trainers)
E2E_MATRICES := $(patsubst %,tests/e2e/test_%.py,families prompt_matrix)

e2e-trained: install-test
	$(BIN)/python $(PYTEST) $(E2E_TRAINED)

e2e-finished: install-test
	$(BIN)/python $(PYTEST) tests/e2e $(patsubst %,--ignore %,$(E2E_TRAINED) $(E2E_MATRICES))

e2e-matrices: install-test
	$(BIN)/python $(PYTEST) $(E2E_MATRICES)

browser: install-test  ## test the report in a real browser, which is installed for it where root can do so
	@$(BIN)/python tests/browser/chromium.py install || [ $$? = 3 ]
	$(BIN)/python $(PYTEST) tests/browser

slurm: install-test  ## test on a real SLURM, which is installed and started for it where root can do so
	@$(BIN)/python tests/slurm/cluster.py install || [ $$? = 3 ]
	$(BIN)/python $(PYTEST) --numprocesses=6 --dist=worksteal tests/slurm

gpu: install-test  ## test what only a GPU shows; needs one
	$(VENV)/train/bin/python $(PYTEST) tests/gpu/test_gpu_training.py
	$(VENV)/eval/bin/python $(PYTEST) tests/gpu/test_gpu_evaluation.py

docs: install-test  ## write what is generated (schema, reference, conda files), and the site: .venv/site
	$(BIN)/python scripts/make_docs.py
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs -d $(VENV)/site-read . $(VENV)/site
	@echo "The site: $(VENV)/site/index.html"

clean:  ## remove the environments and what the demo made
	rm -rf $(VENV) results/capitalisation_rank demo/model demo/model.partial demo/downloads
