# Everything runs in .venv, which is made from requirements.lock; nothing else need be installed
# but Python 3.11 or newer, git and make. PYTHON names another interpreter to make it with.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DVC starts the stages with `python`: the environment's own, whatever the shell has
export PATH := $(CURDIR)/$(BIN):$(PATH)
# nothing is reported to anyone
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
# two processes, each file's tests in one of them: what they share is made once
PYTEST := python -m pytest -n 2 --dist loadfile
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c requirements.lock

.DEFAULT_GOAL := help
.PHONY: help run test test-all lint format ui bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 #/p' Makefile | awk -F'#' '{printf "%-18s%s\n", $$1, $$2}'

run: $(VENV)/run.done ## set up, then run what is out of date and report
	@gpt-pipeline run

test: $(VENV)/dev.done ## set up, then run the tests but the long ones
	@$(PYTEST) -m "not slow"

test-all: $(VENV)/dev.done ## all the tests
	@$(PYTEST)

lint: $(VENV)/dev.done ## ruff and mypy
	@ruff check .
	@ruff format --check .
	@mypy

format: $(VENV)/dev.done ## let ruff format the code
	@ruff check --fix .
	@ruff format .

ui: $(VENV)/run.done ## the MLflow and Prefect pages on loopback
	@gpt-pipeline ui

bench: $(VENV)/dev.done ## measurements against peers, written to bench/results
	@python -m bench

clean: ## remove the environment and what the pipeline made, but no sample and no setting
	rm -rf $(VENV) data models .checkpoints .pipeline .prefect mlflow.db mlartifacts .dvc/cache .dvc/tmp

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11; set PYTHON to a newer one: make run PYTHON=python3.12" >&2; exit 2; }
	@echo "setting up $(VENV) (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/run.done: $(BIN)/python requirements.lock pyproject.toml
	@$(PIP) -e .
	@[ -e .git ] || dvc config --local core.no_scm true
	@touch $@

$(VENV)/dev.done: $(VENV)/run.done
	@$(PIP) -e '.[dev]'
	@touch $@
