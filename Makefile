# The two commands that matter: make demo, make test.
PYTHON ?= python3
# For instance PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
WORKDIR ?= runs/demo

VENV := .venv
RUN := $(VENV)/bin/python
SET_UP := $(VENV)/.set_up
SET_UP_TEST := $(VENV)/.set_up_test

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    collect, transfer and evaluate on a small model; ends with a report to open"
	@echo "make test    the tests (sets up PyTorch and diffusers, to compare with)"
	@echo "make lint    ruff"
	@echo "make setup   the environment of make demo alone, in $(VENV)"
	@echo "make clean   removes $(VENV) and caches; runs/ stays"
	@echo "PYTHON=python3.12 picks the Python (3.11 or newer); PIP_FLAGS goes to pip install."

demo: $(SET_UP)
	JAX_PLATFORMS=cpu $(RUN) train.py --config=configs/demo.py --workdir=$(WORKDIR)
	@echo "The report is $(WORKDIR)/report.html: open it in a browser."

test: $(SET_UP_TEST)
	JAX_PLATFORMS=cpu $(RUN) -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile

lint: $(SET_UP_TEST)
	$(RUN) -m ruff check

setup: $(SET_UP)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./.git/*" -prune -exec rm -rf {} +

# A stamp is touched last: set-up that was cut short, or is older than pyproject.toml, runs again.
$(SET_UP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || \
		{ echo "error: $(PYTHON) is not there: install Python 3.11 or newer, or give PYTHON=..."; exit 2; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: $(PYTHON) is older than Python 3.11: give a newer one, PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
		{ echo "error: $(PYTHON) lacks venv: install it (Debian, Ubuntu: apt install python3-venv)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(PIP_FLAGS) --editable .
	@touch $@

$(SET_UP_TEST): $(SET_UP)
	$(RUN) -m pip install --quiet $(PIP_FLAGS) --editable ".[test]"
	@touch $@
