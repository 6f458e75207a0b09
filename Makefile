# The two commands of the README are `make quickstart` and `make test`. Both install what they need into .venv first,
# may be run again, and survive an interrupted first run.
#   make TORCH=2.7 ...   another tested stack: 2.7, 2.11 or newest; .venv is made anew and keeps it from then on
#   make fuzz            the loaders against 20,000 arbitrary files each, a quarter of an hour
#   make check-curve     does the quickstart's run begin as ours did? RUN=runs/digits_tread
#   make bench           the benchmarks that need neither a GPU nor hours, in short: under 10 minutes
#   make lint            ruff and pyright
#   make matrix          the tests on every stack, each in a .venv of its own (6 to 7 GB each)
#   make lock            resolve every package of every stack anew into constraints/
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3.10 || command -v python3)
BIN := $(VENV)/bin
comma := ,
# Without TORCH: what .venv holds; in a fresh checkout the newest, since one wheel serves Turing to Blackwell.
TORCH ?= $(or $(patsubst $(VENV)/.installed-%,%,$(wildcard $(VENV)/.installed-*)),newest)
TORCHES := 2.7 2.11 newest
# What `make lock` holds fast; all else is the latest that fits. 2.11 stands beside what GPU images bring with it.
PINS_2.7 := torch==2.7.0
PINS_2.11 := torch==2.11.0 transformers==5.17.0 torchmetrics==1.9.0
PINS_newest := torch==2.15.0
# numpy 2.4 and torch 2.15 have no wheel for Python 3.10.
OLDEST_PYTHON_2.7 := 3.10
OLDEST_PYTHON_2.11 := 3.10
OLDEST_PYTHON_newest := 3.11
CONSTRAINTS := constraints/$(subst torchnewest,newest,torch$(subst .,,$(TORCH))).txt
# Named after what is installed: another stack, constraints file or pyproject.toml installs again.
STAMP := $(VENV)/.installed-$(TORCH)
# Compiled at once: where Python may not write bytecode, every start would take 15 s instead of 6.
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

ifeq ($(filter $(TORCH),$(TORCHES)),)
$(error TORCH=$(TORCH): not a tested stack. Take one of: $(TORCHES). Beside a torch of your own: "Beside your torch" in docs/install.md)
endif

.PHONY: quickstart test fuzz check-curve bench lint matrix lock install $(TORCHES:%=lock-%)
.DEFAULT_GOAL := quickstart

quickstart: install
	$(BIN)/composer train.py yamls/digits_tread.yaml

# Two at a time: half of a test's time is waiting, for imports of a process or for another rank. The files that take longest
# begin (tests/conftest.py says which), so that none of them is left for the end.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

fuzz: install
	$(BIN)/python -m pytest tests/test_fuzz.py --hypothesis-profile=long --timeout=3600

check-curve: install
	$(BIN)/python benchmarks/check_curve.py $(or $(RUN),runs/digits_tread)

# One thread: figures of several threads on a shared machine say little.
bench: export OMP_NUM_THREADS = 1
bench: install
	$(BIN)/python benchmarks/step_time.py yamls/dit_s_tread.yaml --device cpu --batch-size 2 --pairs 3
	$(BIN)/python benchmarks/scaling.py --short
	$(BIN)/python benchmarks/trainer_step.py yamls/digits_tread.yaml --device cpu --batches 10
	$(BIN)/python benchmarks/loader.py --samples 2000 --rounds 1
	$(BIN)/python benchmarks/conversion.py --repeats 1
	$(BIN)/python benchmarks/check_figures.py
	folder=$$(mktemp -d) && $(BIN)/python benchmarks/convergence.py digits --steps 60 --points 1 --seeds 17 --methods dense TREAD --out $$folder; \
	code=$$?; rm -rf $$folder; exit $$code

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

install: $(STAMP)

# A .venv that holds no stamp was interrupted while it was filled, and one of another stack holds libraries that the new
# one would neither use nor remove: both are made anew. One that make did not make is left alone.
$(STAMP): $(CONSTRAINTS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if ($(subst .,$(comma) ,$(OLDEST_PYTHON_$(TORCH)))) <= sys.version_info < (3, 14) else f"Python {sys.version.split()[0]} at {sys.executable}: $(OLDEST_PYTHON_$(TORCH)) to 3.13 is needed for TORCH=$(TORCH); say which with make PYTHON=/path/to/python3.12$(if $(filter newest,$(TORCH)),$(comma) or take TORCH=2.11 (Python 3.10 to 3.13))")'
	@if [ -n "$$(ls -A $(VENV) 2>/dev/null)" ] && [ ! -e $(VENV)/.made-by-make ]; then \
	  echo "$(VENV) exists and was not made by make. Remove it, or choose another folder: make VENV=.venv-tread"; exit 2; fi
	@if [ -e $(VENV) ] && [ ! -e $(STAMP) ]; then \
	  echo "$(VENV) is unfinished or of another stack: making it anew"; rm -rf $(VENV); fi
	@rm -f $(STAMP)
	@echo "Installing into $(VENV) (6 to 7 GB, under a minute on a fast line): $(CONSTRAINTS)"
	@if [ ! -e $(VENV) ]; then mkdir -p $(VENV) && touch $(VENV)/.made-by-make && $(PYTHON) -m venv $(VENV); fi
	@# pip alone searches for more than ten minutes for a set that fits; uv takes seconds
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) uv
	$(UV) --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $(STAMP)

matrix:
	@failed=; for stack in $(TORCHES); do echo "== TORCH=$$stack"; \
	  $(MAKE) --no-print-directory test TORCH=$$stack VENV=.venv-$$stack || failed="$$failed $$stack"; done; \
	if [ -n "$$failed" ]; then echo "failed on:$$failed"; exit 1; fi

lock: $(TORCHES:%=lock-%)

# 2.7 is resolved under the ceilings that Composer and streaming declare, the others under [tool.uv] in pyproject.toml.
$(TORCHES:%=lock-%): lock-%: install
	@printf '%s\n' $(PINS_$*) > $(VENV)/pins.txt
	@$(BIN)/uv pip compile --quiet --universal --upgrade --no-build --all-extras $(if $(filter 2.7,$*),--no-config) \
	  --no-annotate --no-header --no-emit-index-url --python-version $(OLDEST_PYTHON_$*) \
	  --constraint $(VENV)/pins.txt pyproject.toml --output-file $(VENV)/lock-$*.txt
	@file=constraints/$(subst torchnewest,newest,torch$(subst .,,$*)).txt; \
	  { sed '/^$$/q' $$file; cat $(VENV)/lock-$*.txt; } > $(VENV)/stack.txt && mv $(VENV)/stack.txt $$file
