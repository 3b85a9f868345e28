# make demo   a fresh machine to a trained model that writes: environment, then every stage there is
# make test   a fresh machine to a tested checkout
# make lint   style and types

PYTHON ?= python3
BIN := .venv/bin
TRAIN ?=

.PHONY: demo test lint

demo: .venv/installed
	$(BIN)/python train.py $(if $(wildcard out/base/run.json),--resume,$(TRAIN))

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TESTS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@
