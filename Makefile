# The two commands of the README are `make demo` and `make test`; both make .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export HF_HUB_OFFLINE := 1
# Processes of the tests, each with one thread; a file's tests share its fixtures.
JOBS ?= 2

.PHONY: demo test lint types check clean

demo: $(VENV)/runtime.stamp
	$(BIN)/kbit run +sweeps=nano/quick
	$(BIN)/kbit figures
	$(BIN)/kbit report

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) results figures report.html build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kbit needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing kbit and its dependencies into $(VENV) (a few minutes the first time)"
	$(PIP) --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	$(PIP) --editable '.[dev]'
	@touch $@
