PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# subnets evaluated in the demo, further options of its nas profile, and of its own
EVALUATIONS ?= 64
PROFILE_OPTIONS ?=
DEMO_OPTIONS ?=
DEMO_OUTPUT ?= demo

.PHONY: install check test test-export test-nas test-all demo clean

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

# a process each: native runtimes of many tests in one process have brought each other down; the first has tests that
# look at the clock
test: install
	$(BIN)/pytest -m 'not slow' tests/hw_profiles tests/predictors
	$(MAKE) --jobs 2 --output-sync test-export test-nas

test-export test-nas: test-%: install
	$(BIN)/pytest -m 'not slow' tests/$*

test-all: install
	$(BIN)/pytest tests/hw_profiles tests/predictors
	$(BIN)/pytest tests/export
	$(BIN)/pytest tests/nas

demo: install
	$(BIN)/python examples/demo.py --output $(DEMO_OUTPUT) --evaluations $(EVALUATIONS) --profile-options='$(PROFILE_OPTIONS)' $(DEMO_OPTIONS)

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) .llm-nas-cache
