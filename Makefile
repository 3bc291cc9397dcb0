PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# subnets evaluated in the demo, further options of its nas profile, and of its own
EVALUATIONS ?= 64
PROFILE_OPTIONS ?=
DEMO_OPTIONS ?=
DEMO_OUTPUT ?= demo

.PHONY: install check test test-nas test-others test-all demo clean

install: $(VENV)/installed

# constraints.txt pins every package; torch is pinned on the command line too, so that no other build replaces it;
# llama.cpp is compiled without its vision part, which takes a minute
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	CMAKE_ARGS='-DLLAVA_BUILD=OFF $(CMAKE_ARGS)' $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev,demo]'
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# a process each: native runtimes of many tests in one process have brought each other down; the first has tests that
# look at the clock, the others take about as long on one core each
test: install
	$(BIN)/pytest -m 'not slow' tests/hw_profiles
	OMP_NUM_THREADS=1 $(MAKE) --jobs 2 --output-sync test-nas test-others

test-nas: install
	$(BIN)/pytest -m 'not slow' tests/nas --ignore tests/nas/test_cli.py

test-others: install
	$(BIN)/pytest -m 'not slow' tests/predictors
	$(BIN)/pytest -m 'not slow' tests/export
	$(BIN)/pytest -m 'not slow' tests/nas/test_cli.py

test-all: install
	$(BIN)/pytest tests/hw_profiles
	$(BIN)/pytest tests/predictors
	$(BIN)/pytest tests/export
	$(BIN)/pytest tests/nas

demo: install
	$(BIN)/python examples/demo.py --output $(DEMO_OUTPUT) --evaluations $(EVALUATIONS) --profile-options='$(PROFILE_OPTIONS)' $(DEMO_OPTIONS)

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) .llm-nas-cache
