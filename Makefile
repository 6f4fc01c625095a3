# make demo   synthesize logs, train, validate and test on two processes
# make test   the whole test suite that needs no GPU
# make test-slurm   jobs on a Slurm that it installs (Debian, root), starts and stops
# make check  format, lint, types, import contracts
# make docs   the documentation site, build/site/index.html; broken links are errors
# Each sets up .venv first. DEVICE=cuda takes the CUDA packages; the default looks for a GPU driver.

PYTHON ?= python3
DEVICE ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
VENV ?= .venv
LISTS ?= requirements
BIN := $(VENV)/bin
READY := $(VENV)/ready-$(DEVICE)
KERNELS := $(VENV)/kernels-$(DEVICE)
DEMO ?= build/demo
# Many tests wait for processes to start: half as many again as cores keep these busy.
TEST_PROCESSES ?= $(shell n=$$(( $$(nproc) * 3 / 2 )); echo $$(( n > 6 ? 6 : n < 2 ? 2 : n )))
DEMO_THREADS = $(shell expr $$(nproc) / 2 \| 1)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slurm check docs format lock clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

setup: $(KERNELS)

# torch alone brings its own dependencies (the CUDA libraries, where it is the CUDA build); everything else is pinned and
# comes without, so that no package replaces torch. requirements/try.sh sets VENV and LISTS, for other releases.
$(READY): $(LISTS)/$(DEVICE).txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else \
	  f"Python {v[0]}.{v[1]} found, 3.10 to 3.12 needed: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Setting up $(VENV) for $(DEVICE) (a few minutes on the first run)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(LISTS)/cuda.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $(LISTS)/$(DEVICE).txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(KERNELS): $(READY) dlrm/kernels/build.py $(wildcard dlrm/kernels/csrc/*)
	@$(BIN)/python -m dlrm.kernels.build
	@$(BIN)/dlrm doctor --no_device
	@touch $@

demo: $(KERNELS)
	@rm -rf $(DEMO)
	$(BIN)/dlrm synthesize $(DEMO)/raw --rows 600000 --days 3
	$(BIN)/dlrm preprocess $(DEMO)/raw/day_*.tsv --output $(DEMO)/days
	OMP_NUM_THREADS=$(DEMO_THREADS) $(BIN)/torchrun --nnodes 1 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0 dlrm_main.py \
	  --recipe debug_cpu --in_memory_binary_criteo_path $(DEMO)/days --run_dir $(DEMO)/run
	@$(BIN)/python benchmarks/demo_summary.py $(DEMO)/raw/truth.json $(DEMO)/run/summary.json

test: $(KERNELS)
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-slurm: $(KERNELS)
	$(BIN)/python -m pytest tests/slurm

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

# -E reads every page anew: of a page that it does not read, Sphinx repeats no warning.
docs: $(READY)
	@rm -rf build/site
	$(BIN)/python -m sphinx -q -W --keep-going -n -E -c docs/site -d build/doctrees . build/site

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:
	requirements/lock.sh

clean:
	rm -rf .venv build
