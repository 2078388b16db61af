# Set-up, checks and the first run. Needs Python 3.10 or newer and make; `make` alone lists the
# commands.
#
# VENV    the environment to create and use. Empty (`make test VENV=`): the active Python
#         environment; only what is missing is installed, nothing in it changes version.
# PYTHON  the interpreter to create it with, or the active one where VENV is empty.
VENV ?= .venv
PYTHON ?= python3

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pip processes must not work on one environment.
.NOTPARALLEL:

# $(call check_python,interpreter,what to do about it)
define check_python
@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || { \
	found=$$($(1) -c 'import platform; print(platform.python_version())' 2>/dev/null); \
	echo "error: Python 3.10 or newer is needed, and '$(1)' is $${found:-missing or broken}. $(2)" >&2; \
	exit 1; }
endef

ifneq ($(strip $(VENV)),)
# Stamps: a step is repeated when what it installs has changed, or when it did not come to its end.
PY := $(VENV)/bin/python
CREATED := $(VENV)/.stamp-created
RUNTIME := $(VENV)/.stamp-runtime
DEV := $(VENV)/.stamp-dev
PROJECT := $(VENV)/.stamp-project
# The stamp of the project holds the name of the library, where one was built.
LIBRARY := mask2former/_C.abi3.so
LIBRARY_GONE := $(filter-out $(wildcard $(LIBRARY)),$(shell cat $(PROJECT) 2>/dev/null))
SOURCES := $(wildcard mask2former/csrc/*.* mask2former/csrc/*/*.*)

$(CREATED):
	$(call check_python,$(PYTHON),Install one or name it: make PYTHON=/path/to/python3.11)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: '$(PYTHON)' cannot create virtual environments (it lacks ensurepip or venv);" \
			"on Debian or Ubuntu: sudo apt install python3-venv" >&2; \
		exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
		echo "[setup] creating $(VENV)"; $(PYTHON) -m venv $(VENV); } || { \
		echo "error: $(VENV) cannot be created; if it is a broken environment, remove it" >&2; \
		exit 1; }
	$(call check_python,$(PY),Remove $(VENV) and repeat)
	@touch $@

$(RUNTIME): requirements.txt requirements-detectron2.txt tools/setup_env.py | $(CREATED)
	@$(PY) tools/setup_env.py runtime
	@touch $@

$(DEV): requirements-dev.txt requirements-evaluation.txt requirements.txt tools/setup_env.py | $(CREATED)
	@$(PY) tools/setup_env.py dev
	@touch $@

$(PROJECT): setup.py pyproject.toml mask2former/__init__.py $(SOURCES) \
		$(if $(LIBRARY_GONE),library-gone) | $(RUNTIME)
	@$(PY) tools/setup_env.py project
	@ls $(LIBRARY) >$@ 2>/dev/null || :

.PHONY: library-gone
library-gone:

else
PY := $(PYTHON)
RUNTIME := active-runtime
DEV := active-dev
PROJECT := active-project

.PHONY: active-python active-runtime active-dev active-project
active-python:
	$(call check_python,$(PY),Activate another environment or name one: make VENV= PYTHON=/path/to/python3.11)
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
		echo "error: '$(PY)' has no pip, which finds and installs what is missing;" \
			"try: $(PY) -m ensurepip" >&2; \
		exit 1; }

active-runtime active-dev: active-%: active-python
	@$(PY) tools/setup_env.py --keep-installed $*

active-project: active-runtime
	@$(PY) tools/setup_env.py --keep-installed project
endif

.PHONY: help env quickstart test lint format
help:
	@echo 'make quickstart  train on the Shapes data, evaluate, write pictures to output/quickstart'
	@echo 'make test        run the tests'
	@echo 'make lint        check style and types'
	@echo 'make format      put the code into the style that lint checks'
	@echo 'make env         only set up what the other commands need'
	@echo
	@echo 'Each command first sets up what is missing in .venv. VENV=DIR: in that folder instead.'
	@echo 'VENV= (empty): in the active Python environment, keeping what is installed there.'
	@echo 'PYTHON=python3.11: with that interpreter.'

env: $(RUNTIME) $(DEV) $(PROJECT)

quickstart: $(RUNTIME) $(PROJECT)
	$(PY) tools/quickstart.py

test: $(RUNTIME) $(DEV) $(PROJECT)
	$(PY) -m pytest

lint: $(RUNTIME) $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
