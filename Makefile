# One virtual environment per framework: TensorFlow and torch in one process can crash.
# `make quickstart` and `make test` do all the set-up; they need Python >= 3.11 with venv.

PYTHON ?= python3
LIGHTNING := .venv/lightning
INSTALL = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Tests that need much longer than the rest are marked `full`.
SELECT ?= -m "not full"
WORKERS ?= 2

.PHONY: quickstart test test-full test-lightning lint types clean

quickstart: $(LIGHTNING)/.installed
	$(LIGHTNING)/bin/partial-embedding fit --config configs/quickstart.yaml

test: test-lightning

test-full:
	$(MAKE) test SELECT=

test-lightning: $(LIGHTNING)/.ready-for-tests
	OMP_NUM_THREADS=1 $(LIGHTNING)/bin/python -m pytest --numprocesses $(WORKERS) $(SELECT)

lint: $(LIGHTNING)/.ready-for-tests
	$(LIGHTNING)/bin/ruff check
	$(LIGHTNING)/bin/ruff format --check

types: $(LIGHTNING)/.ready-for-tests
	$(LIGHTNING)/bin/mypy

$(LIGHTNING)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed. Received: $$($(PYTHON) --version). Pass PYTHON=python3.11."; exit 2; }
	@echo "Installing into $(LIGHTNING); the first time takes a few minutes."
	$(PYTHON) -m venv $(LIGHTNING)
	$(LIGHTNING)/bin/python $(INSTALL) --editable '.[lightning,text]'
	@touch $@

$(LIGHTNING)/.ready-for-tests: $(LIGHTNING)/.installed
	$(LIGHTNING)/bin/python $(INSTALL) --editable '.[lightning,text,transformers,dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
