# make demo and make test need Python 3.10 or newer, pip and make; everything else they install into .venv.
PY   ?= python3
VENV ?= .venv
BIN  := $(VENV)/bin
DEMO ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo lab export course mirror check test slow docs pretrain

help: ## Show this text
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.ok ## Create .venv and install the package with its tools (once)

$(VENV)/.ok: settings.ini setup.py constraints.txt
	$(PY) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'brainldm: Python 3.10 or newer is needed; try make PY=python3.11')"
	$(PY) -m venv $(VENV)
	$(BIN)/pip install $$($(PY) tools/constraints.py) -e '.[course,prepare,dev,docs]'
	touch $@

demo: $(VENV)/.ok ## The whole job on synthetic brains: train, score, draw, report
	$(BIN)/brainldm demo --out $(DEMO)

lab: $(VENV)/.ok ## Open the course in JupyterLab
	$(BIN)/jupyter lab nbs/00_overview.ipynb

export: $(VENV)/.ok ## Clean the notebooks and write brainldm/ from them
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tools/docstrings.py
	$(BIN)/python tools/symbols.py

course: $(VENV)/.ok ## Run every notebook with its long cells and store what it shows; says how long each took
	$(BIN)/python tools/course.py

mirror: $(VENV)/.ok ## Prose, function length, tests, docments and figures of each notebook, in numbers
	$(BIN)/python tools/mirror.py

check: $(VENV)/.ok ## Notebooks clean and in step with the package, lint
	$(BIN)/python tools/in_step.py
	$(BIN)/python tools/symbols.py --check
	$(BIN)/ruff check --select E9,F --ignore F401,F811 brainldm tests tools setup.py
	$(BIN)/ruff check --select E501,E701,E702,E703 --line-length 100 nbs tools setup.py

test: check ## Everything CI runs: check, every notebook, pytest
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

slow: $(VENV)/.ok ## The notebooks with their long cells (and a GPU, if there is one)
	NB_FLAGS="slow gpu" $(BIN)/pytest tests/test_notebooks.py

docs: $(VENV)/.ok ## Build the site in _site/html, offline
	$(BIN)/python tools/docs.py

pretrain: $(VENV)/.ok ## Train, judge and pack the runs that ship with the package (two hours)
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/pretrain.sh runs/pretrain
