# `make quickstart` runs the main job, `make test` runs every check; both install what they need.
# Another interpreter: make quickstart PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Stamps: pip runs again only when pyproject.toml has changed since.
INSTALLED := $(VENV)/installed
INSTALLED_TEST := $(VENV)/installed-test

.PHONY: help quickstart test test-slow lint format clean

help:
	@echo "make quickstart   install, then edit the embedded model and print the summary"
	@echo "make test         install, then lint, type check and run the tests"
	@echo "make test-slow    the tests that take minutes, and 30,000 cases of the fuzz tests"
	@echo "make lint         ruff and mypy only"
	@echo "make format       let ruff rewrite the code"
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

quickstart: $(INSTALLED)
	$(BIN)/editfleet quickstart

test: lint
	$(BIN)/pytest

test-slow: $(INSTALLED_TEST)
	$(BIN)/pytest -m slow
	$(BIN)/pytest -m fuzz --hypothesis-profile=thorough

lint: $(INSTALLED_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED_TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find pipeline jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +
