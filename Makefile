# Two commands: `make quickstart` and `make test`. Both make .venv on first use and are quick after that.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Tests of a file stay together, as they share what is costly to make.
TURNS  := --numprocesses logical --maxprocesses 4 --dist loadfile
MODEL  := .cache/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: help install quickstart test check lint bench readme-tables clean

help:            ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(READY)  ## make .venv with the pinned set

$(READY): pyproject.toml constraints.txt
	@echo "== making $(VENV) with the packages of constraints.txt (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and by its exact pin, so that the index decides between its CPU and CUDA builds
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(MODEL): recipes/fetch_smollm2.py | $(READY)
	@$(BIN)/python recipes/fetch_smollm2.py $@

quickstart: $(READY) $(MODEL)  ## fine-tune SmolLM2-135M on 2 CPU cores in minutes
	@echo "== qlora train recipes/quickstart.yaml"
	@$(BIN)/qlora train recipes/quickstart.yaml --overwrite

test: $(READY) $(MODEL)  ## run the tests
	@echo "== pytest"
	@$(BIN)/python -m pytest -q -m "not exhaustive" $(TURNS)

check: lint $(READY) $(MODEL)  ## lint, types and all tests
	@$(BIN)/python -m pytest -q $(TURNS)

lint: $(READY)  ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

bench: $(READY) $(MODEL)  ## VRAM or tensors, speed and losses of five methods on SmolLM2-135M
	@$(BIN)/qlora bench cpu

readme-tables: $(READY)  ## rewrite the tables of README.md from benchmarks/results
	@$(BIN)/python -m qlora.bench.readme

clean:           ## remove .venv, .cache and outputs
	rm -rf $(VENV) .cache outputs
