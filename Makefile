# The two commands of the README are `make demo` and `make test`; both make .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export HF_HUB_OFFLINE := 1
# Processes of the tests, each with one thread; a file's tests share its fixtures.
JOBS ?= 2

.PHONY: demo test docs pictures lint types check clean

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

# The site, into site/index.html. Warnings are errors, and so is a page that loads anything from outside.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean
	! grep -rE '(src|href)="(https?:)?//[^"]*(\.js|\.css|\.woff2?|shim)"' site --include=*.html

# The example pictures of the site, and the outputs of the notebooks. The two studies take several minutes.
pictures: $(VENV)/dev.stamp
	$(BIN)/kbit run +sweeps=nano/gallery results=results-gallery
	$(BIN)/python docs/make_pictures.py results-gallery
	$(BIN)/kbit run +sweeps=nano/quick
	KBIT_RESULTS=$(CURDIR)/results $(BIN)/python analysis/notebooks/execute.py

check: lint types test docs

clean:
	rm -rf $(VENV) results results-gallery figures report.html site build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kbit needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing kbit and its dependencies into $(VENV) (a few minutes the first time)"
	$(PIP) --editable .
	@touch $@

$(VENV)/docs.stamp: $(VENV)/runtime.stamp
	$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	$(PIP) --editable '.[dev]'
	@touch $@
