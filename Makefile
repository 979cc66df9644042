# finetune-operator: `make help` says what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
CLUSTER ?= local
VENV := .venv
BIN := $(VENV)/bin
CLUSTER_TOOL := $(PYTHON) -m cluster
CONSTRAINTS := $(foreach file,operator trainer development,--constraint constraints/$(file).txt)
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate
PYTEST := $(BIN)/pytest

.PHONY: help demo recipes test chaos bench-operator lint format test-unit test-apiserver test-e2e test-gpu crds constraints \
	cluster-build cluster-up cluster-down cluster-status clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/tools  ## fine-tune, merge and quantize a real model in pods (CLUSTER=current: on the kubeconfig's cluster)
	@$(PYTHON) -m cluster.demo --cluster $(CLUSTER)

recipes: $(VENV)/all  ## the small twins of all recipes, one after another, on the local cluster (ONLY="1 3a": some)
	@$(PYTHON) -m cluster.recipes $(if $(ONLY),--only $(ONLY))

test: $(VENV)/all  ## everything: lint, unit, API server and end-to-end tests
	@$(PYTHON) -m tests.suites lint unit apiserver e2e

chaos: $(VENV)/all  ## the random trials in full, hundreds of kills and full disks (hours)
	@$(PYTHON) -m tests.suites --full chaos

bench-operator: $(VENV)/all  ## the operator at scale beside a plain one (ARGS="--scenario burst --jobs 100": some; --help)
	@$(BIN)/python -m benchmarks.operator $(ARGS)

lint: $(VENV)/all  ## style, types, import contracts
	@$(PYTHON) -m tests.suites lint

test-unit: $(VENV)/all  ## pure code and small models, seconds to minutes
	@$(PYTHON) -m tests.suites unit

test-apiserver: $(VENV)/all  ## the operator against a real kube-apiserver and etcd
	@$(PYTHON) -m tests.suites apiserver

test-gpu: $(VENV)/all  ## every method at real sizes: needs an NVIDIA GPU
	@$(PYTEST) tests/gpu -s

test-e2e: $(VENV)/all  ## real pods on the local cluster, the demo included
	@$(PYTHON) -m tests.suites e2e

format: $(VENV)/all  ## let ruff lay out the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

crds: $(VENV)/all  ## write crds/ and the chart's copy anew from the models
	$(BIN)/python -m finetune_operator.crd

constraints: $(VENV)/tools  ## pin the newest versions that pyproject.toml allows
	$(COMPILE) pyproject.toml --extra operator --output-file constraints/operator.txt
	$(COMPILE) pyproject.toml --extra trainer --constraint constraints/operator.txt --output-file constraints/trainer.txt
	$(COMPILE) --group lint --group test --constraint constraints/operator.txt --constraint constraints/trainer.txt \
		--output-file constraints/development.txt

cluster-build:  ## build the local cluster's parts (once)
	@$(CLUSTER_TOOL) build

cluster-up:  ## start the local cluster, building what is missing
	@$(CLUSTER_TOOL) up

cluster-down:  ## stop it and leave nothing behind
	@$(CLUSTER_TOOL) down

cluster-status:  ## say how it is
	@$(CLUSTER_TOOL) status

clean: cluster-down  ## remove this checkout's cluster and environment (what is cached elsewhere stays)
	rm -rf $(VENV) .cluster

$(VENV)/tools: constraints/tools.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: install python3 and python3-venv." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "A virtual environment cannot be made: install python3-venv." >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement constraints/tools.txt
	@touch $@

$(VENV)/all: $(VENV)/tools pyproject.toml constraints/operator.txt constraints/trainer.txt constraints/development.txt
	@echo "Installing the project and its tools into $(VENV) (about a minute, 5 GB)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[operator,trainer]' --group lint --group test $(CONSTRAINTS)
	@touch $@
