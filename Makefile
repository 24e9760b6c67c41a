# One virtual environment per framework: TensorFlow and torch in one process can crash.
# `make quickstart` and `make test` do all the set-up; they need Python >= 3.11 with venv.

PYTHON ?= python3
LIGHTNING := .venv/lightning
KERAS := .venv/keras
INSTALL = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Tests that need much longer than the rest are marked `full`.
SELECT ?= -m "not full"
WORKERS ?= 2

.PHONY: quickstart quickstart-keras test test-full test-lightning test-keras lint types clean \
  bench bench-full bench-torch bench-keras bench-readme

# One thread: the tensors are small, and threads would wait for each other.
quickstart: $(LIGHTNING)/.installed
	OMP_NUM_THREADS=1 $(LIGHTNING)/bin/partial-embedding fit --config configs/quickstart.yaml

quickstart-keras: $(KERAS)/.installed
	TF_CPP_MIN_LOG_LEVEL=3 $(KERAS)/bin/partial-embedding fit --config configs/quickstart.yaml

test: test-lightning test-keras

test-full:
	$(MAKE) test SELECT=

# What only the TensorFlow half can run, and the rest.
OF_KERAS := tests/tensorflow partial_embedding/tensorflow partial_embedding/callbacks/keras.py \
  partial_embedding/callbacks/keras_monitor.py partial_embedding/recipes/keras_text.py

test-lightning: $(LIGHTNING)/.ready-for-tests
	OMP_NUM_THREADS=1 $(LIGHTNING)/bin/python -m pytest --numprocesses $(WORKERS) $(SELECT) \
	  $(addprefix --ignore=,$(OF_KERAS)) tests/contract tests/torch tests partial_embedding

test-keras: $(KERAS)/.ready-for-tests
	TF_CPP_MIN_LOG_LEVEL=3 $(KERAS)/bin/python -m pytest --numprocesses $(WORKERS) $(SELECT) \
	  $(OF_KERAS) tests/contract tests/test_readme.py

lint: $(LIGHTNING)/.ready-for-tests
	$(LIGHTNING)/bin/ruff check
	$(LIGHTNING)/bin/ruff format --check

types: $(LIGHTNING)/.ready-for-tests
	$(LIGHTNING)/bin/mypy

# A few minutes on two cores, or half an hour; the machine should have nothing else to do.
BENCH ?= runs/bench
bench: bench-torch
	$(MAKE) bench-keras KERAS_STEP="--vocabulary 100000"

bench-full:
	$(MAKE) bench-torch FULL=--full
	$(MAKE) bench-keras

bench-torch: $(LIGHTNING)/.ready-for-bench
	$(LIGHTNING)/bin/python benchmarks/run.py $(FULL) --out $(BENCH)

bench-keras: $(KERAS)/.installed
	$(KERAS)/bin/python benchmarks/keras_step.py $(KERAS_STEP)

bench-readme: $(LIGHTNING)/.installed
	$(LIGHTNING)/bin/python benchmarks/report.py benchmarks/results.json --readme README.md

define make-venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed. Received: $$($(PYTHON) --version). Pass PYTHON=python3.11."; exit 2; }
	@echo "Installing into $(@D); the first time takes a few minutes."
	$(PYTHON) -m venv $(@D)
endef

$(LIGHTNING)/.installed: pyproject.toml constraints.txt
	$(make-venv)
	$(LIGHTNING)/bin/python $(INSTALL) --editable '.[lightning,text]'
	@touch $@

$(LIGHTNING)/.ready-for-tests: $(LIGHTNING)/.installed
	$(LIGHTNING)/bin/python $(INSTALL) --editable '.[lightning,text,transformers,dev,dev-torch]'
	@touch $@

# A contender that cannot be installed is named as missing in the report.
$(LIGHTNING)/.ready-for-bench: $(LIGHTNING)/.installed
	-$(LIGHTNING)/bin/python $(INSTALL) peft
	-$(LIGHTNING)/bin/python $(INSTALL) fbgemm-gpu-cpu
	@touch $@

$(KERAS)/.installed: pyproject.toml constraints.txt
	$(make-venv)
	$(KERAS)/bin/python $(INSTALL) --editable '.[tensorflow,vectors]'
	@touch $@

$(KERAS)/.ready-for-tests: $(KERAS)/.installed
	$(KERAS)/bin/python $(INSTALL) --editable '.[tensorflow,vectors,dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
