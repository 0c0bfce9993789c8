# Two commands do everything: `make demo` and `make test`. Both set up .venv first, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo demo-long test test-fast test-slow cluster-test cluster-faults needs-cluster images bench check format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11"; echo "  -> make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "error: $(PYTHON) cannot make a virtual environment"; echo "  -> on Debian: apt-get install python3-venv"; exit 2; }
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/pirl demo

demo-long: setup
	$(BIN)/pirl demo --recipe demo-long

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two workers share the tests by file.
test: check
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not cluster and not gpu"

# Tests that start no process: the inner loop of a change.
test-fast: setup
	$(BIN)/pytest -n 2 --dist loadfile -m "not process and not slow and not cluster and not gpu"

test-slow: setup
	$(BIN)/pytest -m "slow and not cluster and not gpu"

# Both need a running cluster that may be changed; CONTRIBUTING.md describes their effect on it.
cluster-test: setup needs-cluster
	$(BIN)/pytest -m "cluster and not slow" tests/cluster

cluster-faults: setup needs-cluster
	$(BIN)/pytest -m "cluster and slow" tests/cluster

needs-cluster:
	@test -n "$$KUBECONFIG" || { echo "error: no cluster"; echo "  -> set KUBECONFIG to one that may be changed"; exit 2; }

images:
	docker/build

bench: setup
	$(BIN)/python -m benchmarks

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
