# make demo   install and run the whole way on the demo model
# make test   lint and the test suite        make test-all   also the slow tests
# make bench  figures of docs and README     make lock       resolve requirements*.lock anew
#
# The pip that comes with Python 3.11 takes twice as long over the index pages as a newer one.
# torch is installed apart from the lock (its CPU and CUDA wheels differ in hash). On a machine
# without a GPU, where pip is not configured for a CPU wheel, this saves the CUDA libraries:
#   make venv TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
UV ?= uv
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# Byte code is written when a module is first imported: compiling all of torch up front costs more.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --no-input --no-compile --progress-bar off
PIP_TORCH = $(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
STAMP := $(VENV)/.installed
# One thread a worker: repeatable, and the workers do not fight over the cores.
QUIET_THREADS := PYTHONHASHSEED=0 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
	TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
COMPILE = $(UV) pip compile --universal --python-version 3.11 --generate-hashes --no-header --quiet

.PHONY: help venv demo test test-all lint format bench lock clean
help:
	@sed -n 's/^# //p;/^PYTHON/q' Makefile

venv: $(STAMP)

$(STAMP): requirements.lock pyproject.toml Makefile
	@echo "installing into $(VENV)"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) --require-hashes -r requirements-pip.lock
	$(PIP_TORCH) --no-deps $(TORCH) & torch=$$!; \
	$(PIP) --no-deps --require-hashes -r requirements.lock || { kill $$torch; exit 1; }; \
	wait $$torch
	@# Now what torch itself lacks: nothing for the CPU wheel, NVIDIA's libraries for the other.
	$(PIP_TORCH) $(TORCH)
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

demo: venv
	rm -rf build/demo
	@# Exit code 4 is the gate's "inconclusive": on this small set that is a result, not a defect.
	$(BIN)/medexport build --model demo --adapter demo --int4 --also int8 --offline --out build/demo || test $$? -eq 4

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint
	$(QUIET_THREADS) $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-all: lint
	$(QUIET_THREADS) $(BIN)/python -m pytest -n $(WORKERS) -m "slow or not slow" $(PYTEST_ARGS)

bench: venv
	mkdir -p build/bench
	$(BIN)/python benchmarks/build_500m.py --out build/bench/build_500m.json
	$(BIN)/python benchmarks/graph_speed.py decoder --out build/bench/decoder.json
	$(BIN)/python benchmarks/graph_speed.py tower --out build/bench/tower.json

lock:
	$(COMPILE) --extra build --extra dev --extra dicom --extra sign --no-emit-package torch \
		--output-file requirements.lock pyproject.toml
	$(COMPILE) --output-file requirements-runtime.lock pyproject.toml
	echo "pip>=25.3" | $(COMPILE) --output-file requirements-pip.lock -

clean:
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
