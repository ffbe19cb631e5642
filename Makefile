# Everything starts from a fresh machine: each target first makes .venv and installs into it.
PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
LONG := benchmarks/camvid_from_scratch.py benchmarks/faults.py
QUICK := tests/unit tests/contract tests/property tests/architecture tests/faults tests/e2e src

.PHONY: demo test test-all check parity parity-peers golden faults docs bench bench-camvid clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# the authors' package, a reference of the parity tests; what it says it needs (nose, scipy, ...) is for training
	$(BIN)/python -m pip install --quiet --no-deps resnest==0.0.5
	# what scores must equal; what it says it needs are windows to label pictures in
	$(BIN)/python -m pip install --quiet --no-deps cityscapesscripts==2.3.0 pyquaternion==0.9.9
	touch $(INSTALLED)

demo: $(INSTALLED)  ## train, evaluate and draw a small model on drawn streets
	$(BIN)/nestseg demo --run runs/demo

test: $(INSTALLED)  ## the quick suite, under 15 minutes on 2 cores
	$(PYTEST) -n 2 -m "not slow" $(QUICK)

test-all: $(INSTALLED)  ## everything
	$(PYTEST) -n 2 tests src

parity golden: $(INSTALLED)
	$(PYTEST) -n 2 tests/$@

faults: $(INSTALLED)  ## kills, full disks, damaged files, under 15 minutes; FULL=1 counts hundreds into benchmarks/results
	$(if $(FULL),OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py,$(PYTEST) -n 2 tests/faults)

$(PEERS)/.installed: pyproject.toml constraints.txt tests/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable . pytest pytest-timeout
	# with what they ask for, the peers would bring a second OpenCV over ours, pandas, pycocotools, matplotlib, ...
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement tests/peers/requirements.txt
	touch $@

parity-peers: $(PEERS)/.installed  ## logits equal mmsegmentation's and sssegmentation's own code
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest tests/peers

check: $(INSTALLED)  ## style, types, import contracts, generated files fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate_model_zoo.py --check

docs: $(INSTALLED)  ## write the generated pages
	$(BIN)/python docs/generate_model_zoo.py

bench: $(INSTALLED)  ## time what docs/log.md talks about; writes benchmarks/results
	for script in $(filter-out $(LONG),$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

bench-camvid: $(INSTALLED)  ## two hours: val mIoU beside segmentation_models_pytorch, from scratch
	$(BIN)/python benchmarks/camvid_from_scratch.py

clean:
	rm -rf $(VENV) $(PEERS) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
