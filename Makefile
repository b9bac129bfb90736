# What a contributor and a newcomer type. Everything is installed into .venv, nothing by hand.

PYTHON ?= python3
# Package index for torch alone, such as that of its CPU builds; empty: pip's own configuration.
TORCH_INDEX ?=
TORCH := torch>=2.9,<2.14

# For `make serve`; ARGS takes any flag of `tandem up`.
PORT ?= 8000
MODEL ?=
PREFILL ?= 1
DECODE ?= 1
ARGS ?=
# For `make test`: arguments of pytest, and how many processes share the tests.
TESTS ?=
JOBS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install serve test test-clients chaos soak lint format types check compare bench-quick clean

install: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tandem needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv

# torch first, so that its index serves torch alone and an installed one is kept.
$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

serve: $(INSTALLED)
	@exec $(BIN)/tandem up --port $(PORT) --prefill $(PREFILL) --decode $(DECODE) $(if $(MODEL),--model '$(MODEL)') $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TESTS)

# The fault suites and the cases of the OpenAPI document in full, under an hour on two cores, and
# for hours; `make test` has a fiftieth.
FAULTS = $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -o timeout=0 tests/faults \
	tests/kvtransfer tests/router/test_openapi_cases.py

chaos: $(INSTALLED)
	$(FAULTS) --faults full $(TESTS)

soak: $(INSTALLED)
	$(FAULTS) --faults soak $(TESTS)

# Clients in other languages and of other projects, each in an environment of its own.
CLIENTS := .cache/clients

$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/node/package-lock.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet -r tests/clients/requirements.txt
	@if command -v npm >/dev/null; then cd tests/clients/node && npm ci --no-audit --no-fund; \
		else echo 'No npm here: the clients for Node are left out.'; fi
	@touch $@

test-clients: $(INSTALLED) $(CLIENTS)/.installed
	$(BIN)/python -m pytest tests/clients $(TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED)
	$(BIN)/mypy

check: lint types test

# Tandem beside every rival that is installed; ARGS takes flags such as --quick.
compare: $(INSTALLED)
	$(BIN)/python -m benchmarks.compare $(ARGS)

# Today's speed against the kept one, in under 5 minutes; ARGS=--keep keeps today's.
bench-quick: $(INSTALLED)
	$(BIN)/python -m benchmarks.quick $(ARGS)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
