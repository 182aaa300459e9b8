# Everything happens in .venv, data/ and runs/; `make clean` removes the first only. `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
DATASET := data/ml-100k-cold-item
# Processes that run tests, which often wait. Two of them run Spark with 1 GiB, another one Ray clusters of some workers.
TEST_PROCESSES ?= 3

# What `make demo` trains: runs/demo/<name>, each from a recipe. Zero workers means in this process.
DEMO := sibrar pop random
RECIPE_sibrar := sibrar-cold-item
RECIPE_pop := pop
RECIPE_random := random
WORKERS_sibrar := 2
WORKERS_pop := 0
WORKERS_random := 0
METRICS := $(DEMO:%=runs/demo/%/evaluation/test/metrics.json)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install java demo test lint bench clean
# Kept although they are made on the way to something else.
.SECONDARY:

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

install: .venv/installed ## install into .venv, with the exact versions of constraints.txt

# Runs again only when the requirements change.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	|| { echo "Python 3.11 or newer is needed, and $(PYTHON) is not: install one and name it, as in: make install PYTHON=python3.11"; exit 1; }
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@echo "installing into .venv: some minutes the first time"
	@$(BIN)/python -m pip install --retries 1 -c constraints.txt -e '.[dev]' > .venv/install.log 2>&1 \
	|| { echo "could not download the packages: check the network or pip's index settings; details in .venv/install.log"; exit 1; }
	@touch $@

java:
	@version=$$("$${JAVA_HOME:+$$JAVA_HOME/bin/}java" -version 2>&1 | sed -n 's/.*version "\(1\.\)*\([0-9]*\).*/\2/p'); \
	test "$${version:-0}" -ge 17 \
	|| { echo "Spark needs Java 17 or newer, here it is $${version:-missing}: install one (apt install openjdk-17-jre-headless) or set JAVA_HOME"; exit 1; }

demo: java install $(METRICS) ## MovieLens 100K, from raw files to a table of results; what is there already is kept
	$(BIN)/sibra-dist report $(DEMO:%=runs/demo/%)
	@echo
	@echo "dataset      $(DATASET)"
	@echo "run folders  $(DEMO:%=runs/demo/%)"
	@echo "try next     $(BIN)/sibra-dist evaluate runs/demo/sibrar --hide items.genres"
	@echo "             $(BIN)/sibra-dist train sibrar-cold-item dataset=$(DATASET) training.epochs=5 --to runs/mine"

data/ml-100k/SOURCE.json: | .venv/installed
	$(BIN)/sibra-dist fetch ml-100k --to data/ml-100k

$(DATASET)/manifest.json: | data/ml-100k/SOURCE.json
	$(BIN)/sibra-dist prepare ml-100k --to $(DATASET)

# A run folder without metrics is an interrupted run: it is continued.
runs/demo/%/evaluation/test/metrics.json: | $(DATASET)/manifest.json
	$(BIN)/sibra-dist train $(if $(wildcard runs/demo/$*/config.yaml),--resume runs/demo/$*,$(RECIPE_$*) dataset=$(DATASET) --to runs/demo/$*) --workers $(WORKERS_$*)
	$(BIN)/sibra-dist evaluate runs/demo/$*

test: java install ## run the tests
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: install ## check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install ## every model on MovieLens 1M, beside published figures (hours)
	$(BIN)/python -m benchmarks.quality

clean: ## remove .venv and caches; datasets and runs stay
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
