# The two commands of the README, and what a change must pass. Uses the active virtual environment, or makes .venv.
# Installing is no target with a file of its own, because make cannot name a file whose path holds a space.
VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := "$(VENV)/bin/python"
PYTHON3 ?= python3

.PHONY: train test check matrix faults gpu format clean environment install install-test

train: install
	"$(VENV)/bin/bigtrain" launch configs/quickstart.yaml run.name=quickstart-$$(date +%Y%m%d-%H%M%S)

test: install-test
	$(PYTHON) tests/side_by_side.py

# Every combination of engine, processes, accumulation, precision and optimizer, where `test` takes every pair: hours.
matrix: install-test
	BIGTRAIN_MATRIX=1 $(PYTHON) -m pytest tests/dist

# The fault suite in full counts, of which `test` takes a part: kills, corruption, full disks, hangs.
faults: install-test
	BIGTRAIN_FAULTS=full $(PYTHON) -m pytest tests/faults tests/unit/checkpoint tests/launchers

# Everything that needs a GPU, checked and measured in a few minutes.
gpu: install-test
	$(PYTHON) benchmarks/gpu.py

# The fast half: what a change must pass before it is committed.
check: install-test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -n 2 -m "not slow" tests/unit

format: install-test
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# A virtual environment without pip was broken off while it was made, or made by a tool that needs none.
environment:
	@$(PYTHON) -m pip --version >/dev/null 2>&1 \
		|| $(if $(VIRTUAL_ENV),$(PYTHON) -m ensurepip,$(PYTHON3) -m venv "$(VENV)")

# $(call installed,STAMP): whether STAMP says that this folder was installed after pyproject.toml was last changed.
installed = test "$(VENV)/$(1)" -nt pyproject.toml && grep -qxF "$(CURDIR)" "$(VENV)/$(1)"
STAMP := .bigtrain-installed
TEST_STAMP := .bigtrain-test-installed

install: environment
	@$(call installed,$(STAMP)) || { \
		echo "installing bigtrain into $(VENV): PyTorch alone is some gigabytes, this can take minutes" \
		&& $(PYTHON) -m pip install --quiet -e . && echo "$(CURDIR)" >"$(VENV)/$(STAMP)"; }

install-test: environment
	@$(call installed,$(TEST_STAMP)) || { \
		echo "installing bigtrain and what its tests need into $(VENV): this can take minutes" \
		&& $(PYTHON) -m pip install --quiet -e ".[test]" \
		&& echo "$(CURDIR)" | tee "$(VENV)/$(STAMP)" >"$(VENV)/$(TEST_STAMP)"; }
