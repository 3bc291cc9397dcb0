PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# subnets evaluated in the demo, and further options of its nas profile
EVALUATIONS ?= 64
PROFILE_OPTIONS ?=
DEMO_OUTPUT ?= demo

.PHONY: install check test test-all demo clean

install: $(VENV)/installed

# constraints.txt pins every package; torch is pinned on the command line too, so that no other build replaces it
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev,demo]'
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: install
	$(BIN)/pytest -m 'not slow'

test-all: install
	$(BIN)/pytest

demo: install
	$(BIN)/python examples/demo.py --output $(DEMO_OUTPUT) --evaluations $(EVALUATIONS) --profile-options='$(PROFILE_OPTIONS)'

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) .llm-nas-cache
