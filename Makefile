PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --quiet --disable-pip-version-check
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1|\2/p' Makefile | column -t -s '|'

demo: $(VENV)/.stamp-demo ## Run examples/quickstart.py; results go to demo-output/
	mkdir -p demo-output
	MPLBACKEND=Agg $(BIN)/python examples/quickstart.py $(ARGS)

test: $(VENV)/.stamp-dev ## Run all tests (options for pytest: ARGS="-k name")
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(VENV)/.stamp-dev ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.stamp-docs ## Build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean: ## Remove everything the targets above made, .venv included
	rm -rf $(VENV) demo-output docs/_build dist build *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pyro_shortrun tests examples docs -type d -name __pycache__ -prune -exec rm -rf {} + || true

# The pinned torch goes in first and by itself: asked for as a mere "torch>=2.4", some other build of it, of many
# gigabytes, may be chosen. What is installed afterwards finds its requirement met.
$(VENV)/.stamp-torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(TORCH)
	@touch $@

$(VENV)/.stamp-demo: EXTRAS := examples
$(VENV)/.stamp-dev:  EXTRAS := test,dev
$(VENV)/.stamp-docs: EXTRAS := docs

$(VENV)/.stamp-demo $(VENV)/.stamp-dev $(VENV)/.stamp-docs: $(VENV)/.stamp-torch pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
