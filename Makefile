# The two commands of the README, and what a change must pass. Uses the active virtual environment, or makes .venv.
VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
PYTHON3 ?= python3

.PHONY: train test check format clean

train: $(VENV)/.bigtrain-installed
	$(VENV)/bin/bigtrain launch configs/quickstart.yaml run.name=quickstart-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/.bigtrain-test-installed
	$(PYTHON) -m pytest

# The fast half: what a change must pass before it is committed.
check: $(VENV)/.bigtrain-test-installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -m "not slow" tests/unit

format: $(VENV)/.bigtrain-test-installed
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(PYTHON):
	$(PYTHON3) -m venv $(VENV)

$(VENV)/.bigtrain-installed: pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip install --quiet -e .
	touch $@

$(VENV)/.bigtrain-test-installed: pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip install --quiet -e ".[test]"
	touch $@ $(VENV)/.bigtrain-installed
