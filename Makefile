# The same commands here and in CI. `make` alone lists them.

PYTHON ?= python3
TESTS ?= tests
JOBS ?= auto

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
BENCHMARKS := $(filter-out benchmarks/gpu.py benchmarks/large.py benchmarks/large_search.py benchmarks/lora.py benchmarks/optimizers.py benchmarks/matrix.py benchmarks/paper.py benchmarks/real.py benchmarks/trainers.py,$(sort $(shell grep -l __main__ benchmarks/*.py)))

DEMO := demo
DEMO_CHANGES :=
ifneq ($(TRAIN),)
DEMO := demo_trained
DEMO_CHANGES := name=$(DEMO) objective.file=trained.py objective.settings.checkpoints=models/mnist.trajectory objective.settings.nfe=4 budget.evaluations=50
# the file that a training writes last
DEMO_MODEL := models/mnist.model/unet/diffusion_pytorch_model.safetensors
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick matrix check docs links bench gpu optimizers paper trainers clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## install lcsc_opt, editable, and its tools into .venv (PYTHON=python3.12 chooses the Python)

# torch comes first and alone, so that a version that is already at hand is taken and nothing larger is downloaded.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "lcsc_opt needs Python 3.10 or newer: make setup PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "this Python cannot make environments: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || \
		echo "torchvision does not fit this torch: lcsc works around that; docs/training.md has two lines for scripts of your own"
	@touch $@

demo: setup $(DEMO_MODEL) ## search checkpoints of a small model of digits, compare in demo.html (four to eight minutes with the set-up; TRAIN=1 trains one first)
	$(BIN)/lcsc run studies/demo.yaml $(DEMO_CHANGES)
	@$(BIN)/lcsc report $(DEMO)
	@echo "First images and curves: file://$(CURDIR)/$(DEMO).html; one more search follows"
	$(BIN)/lcsc run studies/demo.yaml $(DEMO_CHANGES) 'optimizers=[LCSC]' space=affine budget.evaluations=60
	$(BIN)/lcsc compare $(DEMO)
	@$(BIN)/lcsc report $(DEMO)
	@echo
	@echo "Open in a browser: file://$(CURDIR)/$(DEMO).html, images before and after, curves, coefficients of each layer"
	@echo "The same, live:    $(BIN)/lcsc dashboard, then http://127.0.0.1:8080"
	@echo "The best model:    $(BIN)/lcsc export $(DEMO) -o best.safetensors"

models/mnist.model/unet/diffusion_pytorch_model.safetensors: | setup
	$(BIN)/lcsc train flow batch_size=64 learning_rate=0.002 --data mnist --steps 600 --checkpoint-every 6 -o models/mnist.trajectory $(if $(wildcard models/mnist.model),--resume)

# Python starts some hundred times: modules are compiled once, not each time, even where the shell says otherwise
test: export PYTHONDONTWRITEBYTECODE :=
test: setup ## run all tests, files side by side (TESTS=tests/metrics runs a part of them, JOBS=0 one after the other)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

quick: ## run the tests without those that take more than ten seconds (less than four minutes on two cores)
	$(MAKE) test TESTS='-m "not slow" tests'

matrix: setup ## the quick tests on other Pythons, dependencies, processors and users (an hour; OPTIONS=--quick: minutes)
	$(BIN)/python benchmarks/matrix.py $(OPTIONS)

check: setup ## lint, formatting, types, and the layers of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup ## the documentation as a site, docs/_build/html/index.html; warnings are errors, Chromium opens it
	@$(BIN)/python -c 'import furo, myst_nb' 2>/dev/null || \
		$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -d docs/_build/doctrees docs docs/_build/html
	$(BIN)/python -m pytest -q tests/test_site.py

links: docs ## ask every other site that the documentation links to (needs a network)
	$(BIN)/python -m sphinx -q -b linkcheck -d docs/_build/doctrees docs docs/_build/links

bench: setup ## run every script in benchmarks/, one after the other (long)
	@for script in $(BENCHMARKS); do echo "== python $$script"; $(BIN)/python $$script || exit 1; done
	@echo "ran $(words $(BENCHMARKS)) benchmarks: $(BENCHMARKS)"

trainers: setup ## nineteen trainers of others, from init to their own loader; benchmarks/results/trainers.md (long; ONLY=timm: one)
	$(BIN)/python benchmarks/trainers.py --work models/trainers --only '$(ONLY)'

gpu: setup ## on a machine with an accelerator: a search, what a trial takes, its tests, benchmarks/results/gpu.md (10 minutes; OPTIONS='--minutes 5')
	$(BIN)/python benchmarks/gpu.py $(OPTIONS)

optimizers: setup ## which optimizer to pick: docs/benchmarks.md measured again (hours; OPTIONS=--quick: minutes)
	$(BIN)/python benchmarks/optimizers.py $(OPTIONS)

paper: setup ## the paper's tables at small scale: docs/paper.md measured again (hours; OPTIONS=--quick: minutes)
	$(BIN)/python benchmarks/paper.py $(OPTIONS)

clean: ## remove caches and built files; .venv, databases and trained models stay
	rm -rf build dist docs/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +
