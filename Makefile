# Everything from a bare machine: needs Python >= 3.11 (with venv) and make. `make demo` is the place to start.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ "$$n" -gt 4 ] && echo 4 || echo "$$n")
PRESET ?= paper
RUNS ?= runs
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXPERIMENTS := demo maps two_moons sampling full_field score_noise scores_two_moons scores_lotka_volterra scores_lensing \
	scores_rounds score_weights folds misspecified default_settings imnn lognormal_field fishnets compressors information marginal_score path path_coverage
FIGURE_RUNS := $(if $(filter paper,$(PRESET)),$(RUNS),$(RUNS)/$(PRESET))
FIGURES := $(filter-out paper_figures/__init__.py,$(wildcard paper_figures/*.py))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-latest bench bench-sampling figures lint format types clean

help:
	@echo "make demo         run the small LSST-Y10 configuration end to end and write its report"
	@echo "make test         the default tests          make test-slow    the long ones"
	@echo "make test-latest  the tests on the newest version of every dependency"
	@echo "make bench        speed and memory           make figures      every figure (PRESET=smoke for a quick look)"
	@echo "make bench-sampling  gradients and seconds per effective sample (PRESET=smoke, paper or large)"
	@echo "make lint types   ruff, mypy                 make clean        remove the environment and caches"

# Built once, and again when the pins or the metadata change. pip says what went wrong; the stamp comes last.
$(READY): requirements.lock pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "No Python >= 3.11 with the venv module was found; install one, or: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Expected Python >= 3.11; $(PYTHON) is $$("$(PYTHON)" -V 2>&1)." >&2; exit 1; }
	@echo "Setting up $(VENV) with $$("$(PYTHON)" -V) (once; a few minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --use-pep517 -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(READY)

demo: $(READY)
	$(BIN)/diffsbi demo --out $(RUNS)/demo

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

test-latest:
	@[ -n "$(PYTHON)" ] || { echo "No Python >= 3.11 with the venv module was found." >&2; exit 1; }
	@.venv-latest/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv-latest
	.venv-latest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	.venv-latest/bin/python -m pip freeze
	.venv-latest/bin/python -m pytest -n $(JOBS) $(ARGS)

bench: $(READY)
	$(BIN)/python -m experiments.benchmarks

bench-sampling: $(READY)
	$(BIN)/python -m experiments.sampling --preset $(PRESET) --out $(FIGURE_RUNS)/sampling

# The paper preset shares its run folders with `make demo`; the quick look has its own.
figures: $(READY)
	@set -e; for name in $(EXPERIMENTS); do \
		echo "experiment: $$name"; $(BIN)/python -m experiments.$$name --preset $(PRESET) --out $(FIGURE_RUNS)/$$name; done
	@set -e; for file in $(FIGURES); do $(BIN)/python -m paper_figures.$$(basename $$file .py) --runs $(FIGURE_RUNS); done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-latest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
