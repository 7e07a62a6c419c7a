# Fused FP8 MoE for flashinfer-bench. `make help` lists the targets.
#
#   make run                      benchmark on the GPU; without one, check in Triton's interpreter
#   make run TIER=strict          the same at another tolerance: profile (default), contest or strict
#   make run ARGS="--isolated"    further options: make run ARGS=--help
#   make run PY=python3           with an interpreter that has the packages already: no environment is made
#   FIB_DATASET_PATH=DIR make run the workloads of an existing flashinfer-bench data set

VENV ?= .venv
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)

ifdef PY
ENVIRONMENT :=
else
PY := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.installed
endif

.DEFAULT_GOAL := help
.PHONY: help run test sweep pack dataset readme clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-10s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(ENVIRONMENT) ## benchmark, measure, print the table; exit status 1 unless every workload passed
	$(PY) -m scripts.run $(ARGS)

test: $(ENVIRONMENT) ## run the tests, on the CPU or on the GPU where there is one
	$(PY) -m pytest $(ARGS)

sweep: $(ENVIRONMENT) ## measure over T, active experts and spreads, and where the time goes; needs a GPU
	$(PY) -m scripts.sweep $(ARGS)

pack: $(ENVIRONMENT) ## write solution.json from config.toml and solution/triton
	$(PY) -m scripts.pack $(ARGS)

dataset: $(ENVIRONMENT) ## write a flashinfer-bench data set with the 19 published workloads to build/dataset
	$(PY) -m scripts.dataset build/dataset

readme: $(ENVIRONMENT) ## write the recorded results into README.md and draw them
	$(PY) -m scripts.readme
	$(PY) -m scripts.plot

clean: ## remove build outputs and caches; the environment stays
	rm -rf build .pytest_cache .hypothesis
	find scripts solution tests -name __pycache__ -type d -prune -exec rm -rf {} +

# flashinfer-bench goes in without its dependencies: it asks for the 2 GB of flashinfer, which nothing here imports.
$(VENV)/.installed: requirements.txt
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { echo 'PYTHON: expected Python 3.10, 3.11 or 3.12,' \
	    'got "$(PYTHON)"; name one with PYTHON=...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -r requirements.txt
	$(VENV)/bin/python -m pip install --no-deps flashinfer-bench==0.1.2
	@touch $@
