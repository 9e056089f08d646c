# Everything runs in .venv. The stamp file says that its packages match constraints.txt, settings.ini and setup.py.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
WORKERS ?= 2
# JupyterLab refuses root, which one is in a container, unless this is said.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help setup demo test test-lab lab readme clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): constraints.txt settings.ini setup.py
	@echo "Setting up .venv (once; a minute or more) ..."
	$(PYTHON) -c 'import sys; sys.exit("musekit needs Python 3.10 or later; try make PYTHON=python3.12") if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(STAMP) ## create .venv with the pinned packages

demo: $(STAMP) ## train on real handwriting and draw from unseen prompts (about 4 minutes on 2 cores)
	$(BIN)/musekit demo $(ARGS)

lab: $(STAMP) ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs $(AS_ROOT) $(ARGS)

readme: $(STAMP) ## make README.md from nbs/index.ipynb
	$(BIN)/python tests/readme.py --write

test: $(STAMP) ## notebooks clean, package and README in sync, notebooks and tests pass
	$(BIN)/python tests/in_sync.py
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks.py --workers $(WORKERS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests

test-lab: $(STAMP) ## run every notebook in JupyterLab in a browser and move its widgets (installs Debian's Chromium)
	$(BIN)/python tests/lab.py --install $(ARGS)

clean: ## remove the environment; runs/ stays
	rm -rf .venv build dist *.egg-info
