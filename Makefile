# Every target builds .venv first when it is missing, then only forwards: what is done already is the receipts' business.
CONFIG ?= demo
RUN ?= $(basename $(notdir $(CONFIG)))
PYTHON ?= python3
PROMPT ?= The

millpond := .venv/bin/millpond
named_run := $(if $(filter-out file,$(origin RUN) $(origin CONFIG)),$(if $(RUN),"$(RUN)"))
hours := $(if $(MAXHOURS),--max-hours "$(MAXHOURS)")
# as they were given, whatever is in them: no shell reads them
export MILLPOND_SET := $(value SET)
export MILLPOND_PROMPT := $(value PROMPT)

ifneq ($(findstring .toml,$(CONFIG)),)
ifneq ($(shell test -f "$(CONFIG)" && echo there),there)
$(error CONFIG=$(CONFIG): there is no such file)
endif
endif

.DEFAULT_GOAL := help

help: ## This list
	@echo "make TARGET [CONFIG=PRESET|FILE.toml] [SET=\"optim.lr=0.01 ...\"] [RUN=NAME]"
	@echo "presets: demo (default), overnight, gpt2, gpt2-tuned, gpt2-book"
	@echo
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## /\1	/' | expand -t 12

prepare: $(millpond) ## Text in, verified token shards out
	@$(millpond) prepare "$(CONFIG)"

plan: $(millpond) ## Estimate download, disk, time and training cost
	@$(millpond) plan "$(CONFIG)"

train: $(millpond) ## Prepare what is missing, train, evaluate, print samples (MAXHOURS=8 saves and stops)
	@$(millpond) train "$(CONFIG)" --name "$(RUN)" $(hours)

resume: $(millpond) ## Train a run further; the newest without RUN (STEPS=N or TOKENS=N makes it longer)
	@$(millpond) resume $(named_run) $(if $(STEPS),--steps "$(STEPS)") $(if $(TOKENS),--tokens "$(TOKENS)") $(hours)

evaluate: $(millpond) ## Validation loss of a run's newest checkpoint; the newest run without RUN
	@$(millpond) evaluate $(named_run)

sample: $(millpond) ## Text from a run's newest checkpoint (PROMPT="...")
	@$(millpond) sample $(named_run) --prompt "$$MILLPOND_PROMPT"

export: $(millpond) ## The model for transformers and llama.cpp; the newest run without RUN
	@$(millpond) export $(named_run)

status: $(millpond) ## What is there: token folders and runs
	@$(millpond) status

doctor: $(millpond) ## Check Python, packages, memory, disk and GPU
	@$(millpond) doctor

test: .venv/dev ## Run the tests, every promise once (a few minutes)
	@.venv/bin/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

test-all: .venv/dev ## Run all tests, with kills, damage and full disks by the dozen
	@.venv/bin/python -m pytest

check: .venv/dev ## Formatting, lint and types
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy

reference: $(millpond) ## Write docs/reference.md from the types and the command line
	@.venv/bin/python docs/reference.py

bench: .venv/dev ## Side-by-side figures of preparing, loading, a step and sampling
	@.venv/bin/python -P tests/benchmarks/prepare.py
	@.venv/bin/python -P tests/benchmarks/loader.py
	@.venv/bin/python -P tests/benchmarks/train.py
	@.venv/bin/python -P tests/benchmarks/sample.py

bench-gpu: .venv/dev ## Measure one GPU (PART=smoke|step|loader|recipes)
	@.venv/bin/python -P tests/benchmarks/gpu.py $(if $(PART),--part $(PART))

$(millpond): pyproject.toml constraints.txt
	@test -d .venv || $(PYTHON) -m venv .venv
	@echo "installing millpond into .venv (a few minutes the first time) ..." >&2
	@.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/dev: $(millpond)
	@echo "installing the development tools into .venv ..." >&2
	@.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

.PHONY: help prepare plan train resume evaluate sample export status doctor test test-all check reference bench bench-gpu
