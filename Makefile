# moelab: `make lab` opens the lab, `make test` runs every test. Both set up .venv first, once.
#
#   make lab  [LAB_ARGS="--no-browser --port 8899"]    JupyterLab on the live dashboard, on 127.0.0.1 only
#   make test [TEST_ARGS="-k store -m 'not browser'"]  the whole suite, on all cores; -n 0: in one process
#   make quick                                         ruff and the fast tests: about a minute, for the edit loop
#   make lint                                          ruff and pyright; tsc and eslint where npm is
#   make pins                                          write binder/pins.txt from what is in .venv
#   make clean                                         remove .venv and caches
#
# PYTHON=python3.12 chooses the Python of .venv; TORCH_INDEX=none leaves the build of torch to pip.

LAB_ARGS  ?=
TEST_ARGS ?=
# Left to `make test`: files that begin processes, fill disks, train, or build many models.
NOT_QUICK := bench_papers calibration challenges cli counterfactual demo_model families faults front_ends \
    moefication moefication_smollm2 pack serve workers
BIN       := .venv/bin
# Two more than cores: browsers, emulated devices and other processes are waited for.
WORKERS    = $(shell $(BIN)/python -c 'import os; print(os.cpu_count() + 2)')

# .venv is compiled when it is first imported; where this is set, every process would do it again: 9 s.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help lab test quick lint pins environment clean

help:
	@sed -n '3,8s/^#  *//p' Makefile

environment:
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" .ci/environment

lab: environment
	@exec $(BIN)/moelab lab $(LAB_ARGS)

test: environment
	@echo "moelab: running the tests"
	@$(BIN)/python -m pytest --numprocesses=$(WORKERS) --maxprocesses=4 $(TEST_ARGS)

quick: environment
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/python -m pytest -q --numprocesses=logical --maxprocesses=4 \
	    -m "not browser and not slow and not alone" $(NOT_QUICK:%=--ignore=tests/test_%.py) $(TEST_ARGS)

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	@.ci/js/check

pins: environment
	@$(BIN)/python .ci/pins

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis test-artifacts
