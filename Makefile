# make quickstart   install into .venv, then pixels to submission on real images
# make test         the tests (under 10 minutes);  make test-slow: the long ones as well
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONHASHSEED := 0

.PHONY: quickstart install test test-slow lint types clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed
	$(BIN)/python -m examples.quickstart

install: $(VENV)/installed-dev

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[extract,report]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[extract,report,notebook,onnx,test,dev]'
	touch $@

clean:
	rm -rf $(VENV) quickstart build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
