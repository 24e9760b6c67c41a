# One virtual environment per framework: TensorFlow and torch in one process can crash.
# `make quickstart` and `make test` do all the set-up; they need Python >= 3.11 with venv.

PYTHON ?= python3
LIGHTNING := .venv/lightning
KERAS := .venv/keras
FLOORS := .venv/floors
INSTALL = -m pip install --quiet --disable-pip-version-check
PINNED = $(INSTALL) --constraint constraints.txt
# What the tests of the torch half need beside the package.
TESTED := --editable '.[lightning,text,transformers]' --group dev --group dev-torch --group docs
# Tests that need much longer than the rest are marked `full`.
SELECT ?= -m "not full"
WORKERS ?= 2

.PHONY: quickstart quickstart-keras test test-full test-lightning test-keras test-floors test-gpu test-wheel \
  lint types docs pictures coverage clean bench bench-full bench-gpu bench-torch bench-keras bench-readme

# One thread: the tensors are small, and threads would wait for each other.
quickstart: $(LIGHTNING)/.installed
	OMP_NUM_THREADS=1 $(LIGHTNING)/bin/partial-embedding fit --config configs/quickstart.yaml

quickstart-keras: $(KERAS)/.installed
	TF_CPP_MIN_LOG_LEVEL=3 $(KERAS)/bin/partial-embedding fit --config configs/quickstart.yaml

test: test-lightning test-keras

test-full:
	$(MAKE) test SELECT=

# What only the TensorFlow half can run, and the rest.
OF_KERAS := tests/tensorflow partial_embedding/tensorflow \
  $(wildcard partial_embedding/recipes/keras_*.py partial_embedding/callbacks/keras*.py)

OF_TORCH := $(addprefix --ignore=,$(OF_KERAS)) tests/contract tests/torch tests partial_embedding
# Neighbours share what was made for them, until a worker has nothing left to do.
PYTEST = -m pytest --numprocesses $(WORKERS) --dist worksteal $(SELECT) $(COVER)

test-lightning: $(LIGHTNING)/.ready-for-tests
	OMP_NUM_THREADS=1 $(LIGHTNING)/bin/python $(PYTEST) $(OF_TORCH)

test-keras: $(KERAS)/.ready-for-tests
	TF_CPP_MIN_LOG_LEVEL=3 $(KERAS)/bin/python $(PYTEST) $(OF_KERAS) tests/contract tests/test_docs.py \
	  tests/test_examples.py

# With the oldest versions that pyproject.toml declares, but for torch's own tests of its embeddings,
# which older releases do not have. Keras has one version, on which test-keras runs.
test-floors: $(FLOORS)/.ready-for-tests
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python $(PYTEST) --ignore=tests/torch/test_nn_suite.py $(OF_TORCH)

# On a machine with a GPU; without one, each file says that it was left out, and pytest says by 5
# that nothing was run.
test-gpu: $(LIGHTNING)/.ready-for-tests
	$(LIGHTNING)/bin/python -m pytest -rs tests/torch/test_gpu.py \
	  tests/lightning/test_lightning_gpu.py tests/transformers/test_trainer_gpu.py || test $$? -eq 5

bench-gpu: $(LIGHTNING)/.ready-for-bench
	$(LIGHTNING)/bin/python -c 'import torch; raise SystemExit(not torch.cuda.is_available() and "A GPU is needed. Received none.")'
	$(LIGHTNING)/bin/python benchmarks/run.py $(FULL) --out $(BENCH)-gpu
	$(LIGHTNING)/bin/python benchmarks/gpu_ways.py --report $(BENCH)-gpu/ways.md

# As users install it: from the wheel, with each extra, outside of the sources.
test-wheel: $(LIGHTNING)/.ready-for-tests
	rm -rf dist && $(LIGHTNING)/bin/python -m build --outdir dist
	$(LIGHTNING)/bin/twine check --strict dist/*
	$(LIGHTNING)/bin/python .ci/try_wheel.py dist/*.whl $(EXTRAS)

# Of both halves together, since the pure parts are tested in either.
coverage:
	$(MAKE) test-lightning COVER="--cov --cov-report="
	$(MAKE) test-keras COVER="--cov --cov-append --cov-report="
	$(LIGHTNING)/bin/coverage report

docs: $(LIGHTNING)/.ready-for-tests
	NO_MKDOCS_2_WARNING=1 $(LIGHTNING)/bin/mkdocs build --strict --quiet

lint: $(LIGHTNING)/.ready-for-tests
	$(LIGHTNING)/bin/ruff check
	$(LIGHTNING)/bin/ruff format --check

types: $(LIGHTNING)/.ready-for-tests
	$(LIGHTNING)/bin/mypy
	$(LIGHTNING)/bin/mypy tests/typing

# What the README and the site show of a run; needs Chromium.
pictures: $(LIGHTNING)/.ready-for-tests
	OMP_NUM_THREADS=1 $(LIGHTNING)/bin/python docs/quickstart.py
	$(LIGHTNING)/bin/python docs/late_unfreeze.py

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

bench-readme: $(LIGHTNING)/.ready-for-bench
	$(LIGHTNING)/bin/python benchmarks/report.py benchmarks/results.json --readme README.md

define make-venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed. Received: $$($(PYTHON) --version). Pass PYTHON=python3.11."; exit 2; }
	@echo "Installing into $(@D); the first time takes a few minutes."
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(INSTALL) 'pip>=25.1'
endef

$(LIGHTNING)/.installed: pyproject.toml constraints.txt
	$(make-venv)
	$(LIGHTNING)/bin/python $(PINNED) --editable '.[lightning,text]'
	@touch $@

$(LIGHTNING)/.ready-for-tests: $(LIGHTNING)/.installed
	$(LIGHTNING)/bin/python $(PINNED) $(TESTED)
	@touch $@

# A contender that cannot be installed is named as missing in the report.
$(LIGHTNING)/.ready-for-bench: $(LIGHTNING)/.installed
	$(LIGHTNING)/bin/python $(PINNED) matplotlib
	-$(LIGHTNING)/bin/python $(PINNED) peft
	-$(LIGHTNING)/bin/python $(PINNED) fbgemm-gpu-cpu
	@touch $@

$(KERAS)/.installed: pyproject.toml constraints.txt
	$(make-venv)
	$(KERAS)/bin/python $(PINNED) --editable '.[tensorflow,vectors]'
	@touch $@

$(KERAS)/.ready-for-tests: $(KERAS)/.installed
	$(KERAS)/bin/python $(PINNED) --editable '.[tensorflow,vectors]' --group dev
	@touch $@

# The oldest versions of what users install, with the newest of what tests need: uv finds a set in
# seconds, where pip tries releases for half an hour.
$(FLOORS)/.ready-for-tests: pyproject.toml
	$(make-venv)
	$(FLOORS)/bin/python $(INSTALL) uv
	$(FLOORS)/bin/python -m uv pip compile --quiet --resolution lowest-direct --no-deps \
	  --extra lightning --extra text --extra transformers --output-file $(@D)/floors.txt pyproject.toml
	$(FLOORS)/bin/python -m uv pip install --quiet --constraint $(@D)/floors.txt $(TESTED)
	@touch $@

clean:
	rm -rf .venv build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
