# Set-up, checks and the first run. Needs Python 3.10 or newer and make; `make` alone lists the
# commands.
#
# VENV    the environment to create and use. Empty (`make test VENV=`): use the active Python
#         environment; only missing packages are installed, no installed one changes version.
# PYTHON  the interpreter to create it with, or the active one if VENV is empty.
# JOBS    processes that share the test files, each with one thread.
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pip processes must not modify one environment at the same time.
.NOTPARALLEL:

# $(call check_python,interpreter,remedy)
define check_python
@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || { \
	found=$$($(1) -c 'import platform; print(platform.python_version())' 2>/dev/null); \
	echo "error: Python 3.10 or newer is needed, but '$(1)' is $${found:-missing or broken}. $(2)" >&2; \
	exit 1; }
endef

ifneq ($(strip $(VENV)),)
# Stamps: a step is repeated if its inputs have changed or if it did not finish.
PY := $(VENV)/bin/python
CREATED := $(VENV)/.stamp-created
RUNTIME := $(VENV)/.stamp-runtime
DEV := $(VENV)/.stamp-dev
PROJECT := $(VENV)/.stamp-project
# The project stamp holds the name of the library, if one was built.
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
		echo "error: $(VENV) cannot be created; if it is broken, remove it" >&2; \
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
		echo "error: '$(PY)' has no pip to install missing packages;" \
			"try: $(PY) -m ensurepip" >&2; \
		exit 1; }

active-runtime active-dev: active-%: active-python
	@$(PY) tools/setup_env.py --keep-installed $*

active-project: active-runtime
	@$(PY) tools/setup_env.py --keep-installed project
endif

.PHONY: help env quickstart test gpu-check lint format
help:
	@echo 'make quickstart  train on the Shapes data, evaluate, write pictures to output/quickstart'
	@echo 'make test        run the tests'
	@echo 'make gpu-check   check numbers, memory and speed on a GPU, results in output/gpu_check'
	@echo 'make lint        check style and types'
	@echo 'make format      format the code'
	@echo 'make env         only set up the environment'
	@echo
	@echo 'Each command first sets up what is missing in .venv, or in DIR with VENV=DIR.'
	@echo 'VENV= (empty): use the active Python environment and keep its installed versions.'
	@echo 'PYTHON=python3.11: use that interpreter.'

env: $(RUNTIME) $(DEV) $(PROJECT)

quickstart: $(RUNTIME) $(PROJECT)
	$(PY) tools/quickstart.py

test: $(RUNTIME) $(DEV) $(PROJECT)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile

gpu-check: $(RUNTIME) $(DEV) $(PROJECT)
	$(PY) tools/gpu_check.py output/gpu_check

lint: $(RUNTIME) $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
