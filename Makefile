# The two commands of the README are `make quickstart` and `make test`. Both install what they need into .venv first,
# may be run again, and survive an interrupted first run.
#   make lint       ruff and pyright
#   make lock       resolve every package anew into constraints.txt
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.10 || command -v python3)
BIN := $(VENV)/bin
# Named after what is installed: another constraints.txt or pyproject.toml installs again.
STAMP := $(VENV)/.installed
# Compiled at once: where Python may not write bytecode, every start would take 15 s instead of 6.
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

.PHONY: quickstart test lint lock install
.DEFAULT_GOAL := quickstart

quickstart: install
	$(BIN)/composer train.py yamls/digits_tread.yaml

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

install: $(STAMP)

# A .venv that holds no stamp was interrupted while it was filled: it is made anew, since a half-copied package can
# look complete. One that make did not make is left alone.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 13) else f"Python {sys.version.split()[0]} at {sys.executable}: 3.10, 3.11 or 3.12 is needed; say which with make PYTHON=/path/to/python3.11")'
	@if [ -n "$$(ls -A $(VENV) 2>/dev/null)" ] && [ ! -e $(VENV)/.made-by-make ]; then \
	  echo "$(VENV) exists and was not made by make. Remove it, or choose another folder: make VENV=.venv-tread"; exit 2; fi
	@if [ -e $(VENV) ] && [ ! -e $(STAMP) ]; then echo "$(VENV) is unfinished: making it anew"; rm -rf $(VENV); fi
	@rm -f $(STAMP)
	@echo "Installing into $(VENV) (about 6 GB, under a minute on a fast line)"
	@if [ ! -e $(VENV) ]; then mkdir -p $(VENV) && touch $(VENV)/.made-by-make && $(PYTHON) -m venv $(VENV); fi
	@# pip alone searches for more than ten minutes for a set that fits; uv takes seconds
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(UV) --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

lock: install
	$(BIN)/uv pip compile --quiet --universal --upgrade --python-version 3.10 --no-annotate --no-header --no-emit-index-url \
	  --all-extras pyproject.toml --output-file constraints.tmp
	@{ sed -n '/^#/p;/^$$/q' constraints.txt; sed '/^-e /d' constraints.tmp; } > constraints.new
	@mv constraints.new constraints.txt && rm constraints.tmp
