# Two commands: `make demo` and `make test`. Each sets up .venv first when it is not there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Extra arguments for pip, for example an index that carries CPU-only builds of torch.
PIP_ARGS ?=
EXTRAS := serve,structured,rag,pdf,train,plots,dev

.PHONY: demo test test-slow lint docs clean setup
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, then plan, train, serve and retrieve on this machine"
	@echo "make test       set up, then lint, types, layering and the fast tests"
	@echo "make test-slow  the tests marked slow"
	@echo "make lint       ruff, mypy and import-linter only"
	@echo "make docs       write the generated reference pages under docs/reference"
	@echo "make clean      remove .venv, caches and runs"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: setup
	$(BIN)/toolkit demo

test: setup lint
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not gpu and not peer"

test-slow: setup
	$(BIN)/python -m pytest -m "slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: setup
	$(BIN)/python -m toolkit.cli.reference docs/reference

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis runs build *.egg-info
