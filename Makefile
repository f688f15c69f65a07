# The two commands of the README, and the targets they need.
PYTHON ?= python3
BIN := .venv/bin
RUN_DIR ?= $(CURDIR)/runs/demo
SEED ?= 1
COUNT ?= 600
WORKERS ?= 2

.PHONY: demo routers test test-slow chaos mutants bench lint docs setup clean

demo: setup  ## train the demo pool, evaluate six routers, end with a table and two figures
	$(BIN)/python -m harness.run pool=demo "run.dir='$(RUN_DIR)'"

routers: setup  ## evaluate every router on the demo's pool
	$(BIN)/python -m harness.run pool=demo "run.dir='$(RUN_DIR)'" 'router=[all]' router.multitask.steps=48

test: setup  ## the fast tests, then single components on a cluster
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal
	$(BIN)/python -m pytest -m slow --ignore=tests/end_to_end --ignore=tests/chaos \
		-n 3 --dist loadscope --no-loadscope-reorder

# Three at a time on two cores: these wait for other processes for much of their time.
test-slow: setup  ## complete runs, launches, chaos
	$(BIN)/python -m pytest -m slow tests/end_to_end tests/chaos \
		-n 3 --dist loadscope --no-loadscope-reorder

chaos: setup  ## kill the processes of runs again and again; the results must not change
	$(BIN)/python -m tests.chaos

mutants: setup  ## change the code that computes numbers; at most 15 % of the changes may go unnoticed
	$(BIN)/python -m tests.mutation --seed $(SEED) --count $(COUNT) --workers $(WORKERS)

bench: setup  ## the speed of routing, scoring, generation and training against their baselines
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks

lint: setup  ## formatting, lint, types, spelling, and which room may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/codespell --builtin en-GB_to_en-US --ignore-words-list standardise,dialogue,dialogues \
		phatgoose harness results benchmarks clusters examples/*.py *.md docs/*.md docs/*.py
	$(BIN)/lint-imports --no-logo

docs: setup  ## the documentation as a site in docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build/html

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt setup.py phatgoose/ops/cpu_kernels.cpp phatgoose/ops/cpu_vectors.h
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; call: make PYTHON=python3.11 ...")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:  ## remove the environment and the runs, keep the cache
	rm -rf .venv runs build phatgoose_cpu_*.so
