# Everything a newcomer types. `make` alone lists the targets.
#
#   PYTHON   the interpreter the environment is made from   (python3, 3.10 or newer)
#   VENV     where the environment goes                      (.venv)
#   TORCH    the PyTorch to install                          (the newest)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
BIN := $(VENV)/bin

DEMO_DATA ?= data/demo
DEMO_LOGS ?= logs
DEMO_CONFIG ?= configs/demo.yaml
DEMO_NAME ?= demo
DEMO_GENERATE ?= train_identities=160 images_per_identity_aerial=12 images_per_identity_ground=12 write_parts=true
DEMO_TRAIN ?=
DEMO_RUN := $(DEMO_LOGS)/$(DEMO_NAME)

# A file's tests share what they compile.
SIDE_BY_SIDE := -n auto --maxprocesses 8 --dist loadfile

# What the oldest supported PyTorch is, for `make test-abi`.
OLDEST_TORCH ?= torch==2.11.0
OLDEST_VENV ?= .venv-oldest

NATIVE_SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
CXX_FILES := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' 'benchmarks/*.cpp' 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.PHONY: install
install: $(VENV)/.installed ## make the environment and compile the extension into it

$(VENV)/.environment: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)' torchvision 'setuptools>=77' wheel ninja 'pybind11>=2.13' numpy
	touch $@

# No build isolation: the environment already holds the PyTorch to build against, and an isolated
# build would download it a second time.
$(VENV)/.installed: $(VENV)/.environment $(NATIVE_SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[test]'
	$(BIN)/gsalign info
	touch $@

.PHONY: demo
demo: install ## generate data, train, evaluate and draw pictures under logs/demo
	$(BIN)/gsalign data generate --out $(DEMO_DATA) $(DEMO_GENERATE)
	$(BIN)/gsalign train --config-file $(DEMO_CONFIG) --data-root $(DEMO_DATA) --output $(DEMO_RUN) --overwrite $(DEMO_TRAIN)
	$(BIN)/gsalign eval --config-file $(DEMO_RUN)/config.yaml --checkpoint $(DEMO_RUN)/model_final.safetensors --baselines
	$(BIN)/gsalign visualize --run $(DEMO_RUN)
	@echo "Pictures, checkpoints and metrics: $(DEMO_RUN)"

.PHONY: demo-short
demo-short: ## the demo on a small set and few steps, to see that every step works
	$(MAKE) demo DEMO_DATA=data/demo-short DEMO_NAME=demo-short \
	  DEMO_GENERATE="train_identities=16 test_identities=8 images_per_identity_aerial=6 images_per_identity_ground=6 write_parts=true" \
	  DEMO_TRAIN="training.iterations=40"

.PHONY: test
test: install ## run the tests, a file to a core
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# What compiles or interprets GPU kernels has nothing to do with the wheel's binary interface. Under the
# newest PyTorch `make test` has run everything; here a few files show that the wheel holds it too.
ABI_TESTS := --ignore=../tests/kernels/test_gpu_targets.py --ignore=../tests/kernels/test_triton_interpreted.py
WHEEL_TESTS := ../tests/kernels/test_backends.py ../tests/kernels/test_export.py
ON_WHEEL = cd $(CURDIR)/dist && export PYTHONPATH=$(CURDIR)/dist/site && \
	  $(1) -c "import torch, gsalign_kernels as k; print(torch.__version__, k.__file__)" && \
	  $(1) -m pytest $(SIDE_BY_SIDE) -p no:cacheprovider $(2)

.PHONY: test-abi
test-abi: install ## build one wheel, run the operator tests on it under the oldest PyTorch, some under the newest
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python -m pip install --quiet --no-deps --target dist/site dist/gsalign-*.whl
	test -x $(OLDEST_VENV)/bin/python || $(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST_VENV)/bin/python -m pip install --quiet '$(OLDEST_TORCH)' numpy scipy hypothesis pytest pytest-xdist setuptools
	$(call ON_WHEEL,$(abspath $(BIN)/python),$(WHEEL_TESTS))
	$(call ON_WHEEL,$(abspath $(OLDEST_VENV)/bin/python),../tests/kernels $(ABI_TESTS))

.PHONY: bench
bench: install ## measure the operators and the model against their alternatives
	$(BIN)/python -m benchmarks

.PHONY: lint
lint: $(VENV)/.extra-dev ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

.PHONY: docs
docs: $(VENV)/.extra-docs ## build the documentation site under build/docs
	$(BIN)/python -m sphinx -W --keep-going -n -q docs build/docs
	@echo "The site: build/docs/index.html"

# What an extra of the package asks for, without building the package again.
$(VENV)/.extra-%: $(VENV)/.installed
	$(BIN)/python -c "from importlib.metadata import requires; print(*[r.split(';')[0] for r in requires('gsalign') if '$*' in r.split(';')[-1]], sep='\n')" > $(VENV)/$*.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/$*.txt
	touch $@

.PHONY: clean
clean: ## remove what was built (environments, data and logs stay)
	rm -rf build dist *.egg-info gsalign_kernels/*.so gsalign_kernels/_build_report.json
	rm -f $(VENV)/.installed
