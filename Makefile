# `make quickstart` runs the main job, `make test` runs every check; both install what they need.
# Another interpreter: make quickstart PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Stamps: pip runs again only when pyproject.toml has changed since.
INSTALLED := $(VENV)/installed
INSTALLED_TEST := $(VENV)/installed-test
INSTALLED_SLOW := $(VENV)/installed-slow

.PHONY: help quickstart test test-slow lint format benchmarks clean

help:
	@echo "make quickstart   install, then edit the embedded model and print the summary"
	@echo "make test         install, then lint, type check and run the tests"
	@echo "make test-slow    the tests that take minutes, and 30,000 cases of the fuzz tests"
	@echo "make lint         ruff and mypy only"
	@echo "make format       let ruff rewrite the code"
	@echo "make benchmarks   measure each phase (benchmarks/README.md)"
	@echo "make clean        remove .venv, caches and build output"

$(INSTALLED): pyproject.toml
	@echo "Installing editfleet into $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --editable .
	@touch $@

$(INSTALLED_TEST): pyproject.toml
	@echo "Installing editfleet and its test tools into $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --editable '.[test]'
	@touch $@ $(INSTALLED)

# The job server of Ray, for the tests that submit to a cluster.
$(INSTALLED_SLOW): $(INSTALLED_TEST)
	@$(PIP) install --editable '.[cluster]'
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/editfleet quickstart

# Two at a time with a thread each: most tests are tiny, and some wait for processes to start. In the
# folders' order, since a file of one test may take minutes and shall not be left to the end.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(INSTALLED_SLOW)
	$(BIN)/pytest -m slow
	$(BIN)/pytest -m fuzz --hypothesis-profile=thorough

lint: $(INSTALLED_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED_TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The embedded model and world unless told otherwise; give all of MODEL, REQUESTS, CORPUS and SPEC.
MODEL ?= factworld
REQUESTS ?= factworld
CORPUS ?= factworld
SPEC ?= jobs/specs/quickstart.yaml
WORKLOAD = --spec $(SPEC) --model $(MODEL) --requests $(REQUESTS)

benchmarks: $(INSTALLED_TEST)
	$(BIN)/python -m benchmarks.values $(WORKLOAD)
	$(BIN)/python -m benchmarks.keys $(WORKLOAD)
	$(BIN)/python -m benchmarks.reduce
	$(BIN)/python -m benchmarks.covariance $(WORKLOAD) --corpus $(CORPUS)
	$(BIN)/python -m benchmarks.evaluation $(WORKLOAD)
	$(BIN)/python -m benchmarks.t_patcher $(WORKLOAD) --corpus $(CORPUS)
	$(BIN)/python -m benchmarks.reading $(WORKLOAD) --edits 200

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find pipeline jobs benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
