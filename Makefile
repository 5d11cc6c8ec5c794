# Everything a contributor or CI runs. `make demo` and `make test` work in a fresh clone.

PYTHON ?= python3
PORT ?= 8000
# Where `make default-model` puts its result.
OUT ?= runs/default_model
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup check format test test-fast test-browser test-clients test-cluster serve demo bench default-model evaluate clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# Installs again only when the dependencies have changed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve,batch,page,dicom,quantization,train,dev]'
	@touch $@

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# After the fast tests, those that start a service or a browser, two files at a time: starting or losing a replica is
# mostly waiting. The order of file names happens to put long ones first.
test: test-fast
	$(BIN)/pytest -m "ray or browser" --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=25

# In parallel on all cores. Tests that start a service or a browser are left out, because each needs several cores.
test-fast: setup
	$(BIN)/pytest -m "not ray and not browser" --numprocesses logical --maxprocesses 8 --dist worksteal --durations=15

# The web page in Chromium: apt-get install chromium chromium-driver. Skipped where these are missing.
test-browser: setup
	$(BIN)/pytest -m browser

# LangChain and LiteLLM against the service. Their packages are needed by nothing else here.
test-clients: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[clients]'
	$(BIN)/pytest tests/deployments/test_clients.py tests/examples

# Faults on a cluster of network namespaces; needs root or the right to create them. `make test` has a short form.
test-cluster: setup
	LLAVA_TEST_CLUSTER=1 $(BIN)/pytest tests/benchmarks/hosts

demo: setup
	$(BIN)/llava demo --port $(PORT)

serve: setup
	$(BIN)/llava serve --port $(PORT)

bench: setup
	$(BIN)/python -m benchmarks --port $(PORT)

# Rebuilds the default model and its data from scratch; resumes an interrupted run.
default-model: setup
	$(BIN)/llava default-model build $(OUT)

evaluate: setup
	$(BIN)/llava default-model evaluate

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
