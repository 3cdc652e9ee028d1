# Two commands: `make quickstart` and `make test`. Both make .venv on first use and are quick after that.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Tests of a file stay together, as they share what is costly to make.
TURNS  := --numprocesses logical --maxprocesses 4 --dist loadfile
MODEL  := .cache/SmolLM2-135M-Instruct.Q4_1.gguf

# Of their own environment, as they bring thirty packages along that no run needs.
AUDIT  := .cache/pip-audit
PIP_AUDIT := $(AUDIT)/bin/pip-audit

.PHONY: help install quickstart test torture check lint audit bench readme-tables pins clean

help:            ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(READY)  ## make .venv with the pinned set

$(READY): pyproject.toml constraints.txt
	@echo "== making $(VENV) with the packages of constraints.txt (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# All but torch: what is listed, by hash, and as wheels, since what builds others would come without one.
	@grep -v '^torch==' constraints.txt | $(PIP) install --require-hashes --no-deps --only-binary :all: -r /dev/stdin
	@# What torch needs is there by now; a CUDA build brings its libraries.
	@$(PIP) install $$(grep '^torch==' constraints.txt)
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@$(PIP) check
	@touch $@

$(MODEL): recipes/fetch_smollm2.py | $(READY)
	@$(BIN)/python recipes/fetch_smollm2.py $@

quickstart: $(READY) $(MODEL)  ## fine-tune SmolLM2-135M on 2 CPU cores in minutes
	@echo "== qlora train recipes/quickstart.yaml"
	@$(BIN)/qlora train recipes/quickstart.yaml --overwrite

test: $(READY) $(MODEL)  ## run the tests
	@echo "== pytest"
	@$(BIN)/python -m pytest -q -m "not exhaustive" $(TURNS)

torture: $(READY) $(MODEL)  ## kills, faults, fuzzing and a soak: all that `make test` takes a sample of
	@$(BIN)/python -m pytest -q --torture -m torture $(TURNS)

check: lint audit $(READY) $(MODEL)  ## lint, types, known vulnerabilities and all tests
	@$(BIN)/python -m pytest -q $(TURNS)

lint: $(READY)  ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

audit:           ## report pins with known vulnerabilities, where they can be looked up
	@mkdir -p $(dir $(AUDIT)); log=$(AUDIT).log; pins=$(AUDIT).pins; \
	sed -n 's/^\([^ #]*==[^ ]*\).*/\1/p' constraints.txt >$$pins; \
	{ test -x $(PIP_AUDIT) || { $(PYTHON) -m venv $(AUDIT) && \
	  $(AUDIT)/bin/python -m pip --quiet --disable-pip-version-check install pip-audit==2.9.0; } && \
	  $(PIP_AUDIT) --requirement $$pins --no-deps --disable-pip --progress-spinner off; } >$$log 2>&1; status=$$?; \
	if grep -q '^Found [0-9]' $$log; then cat $$log; exit 1; fi; \
	unknown=$$(grep -c 'could not be audited' $$log); all=$$(grep -c . $$pins); \
	if test $$status -ne 0; then echo "audit skipped: $$(tail -n 1 $$log)"; \
	elif test $$unknown -gt 0; then echo "audit skipped for $$unknown of $$all pins, which the service does not know"; \
	else echo "audit: no known vulnerabilities in $$all pins"; fi

bench: $(READY) $(MODEL)  ## VRAM or tensors, speed and losses of five methods on SmolLM2-135M
	@$(BIN)/qlora bench cpu

readme-tables: $(READY)  ## rewrite the tables of README.md from benchmarks/results
	@$(BIN)/python -m qlora.bench.readme

pins:            ## look up the hashes of the versions in constraints.txt; takes uv
	@mkdir -p .cache; { grep '^#\|^torch==' constraints.txt; \
	  grep -v '^#\|^torch==\|^ *--hash' constraints.txt | sed 's/ *\\$$//' | uv pip compile --quiet --universal \
	    --python-version 3.11 --no-deps --no-annotate --no-header --generate-hashes -; } >.cache/constraints.txt
	@mv .cache/constraints.txt constraints.txt

clean:           ## remove .venv, .cache and outputs
	rm -rf $(VENV) .cache outputs
