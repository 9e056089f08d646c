# Everything runs in .venv; the stamp file says that its packages match constraints.txt, settings.ini and setup.py.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
THREADS := OMP_NUM_THREADS=1

.PHONY: help setup demo test lab readme clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): constraints.txt settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(STAMP) ## create .venv with the pinned packages
