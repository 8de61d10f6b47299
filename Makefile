# Every target sets up what it needs: an own virtual environment, torch first, then the package.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo test conformance lint bench yardstick clean

demo: $(READY)
	$(BIN)/moe-peft demo --output-dir demo_output

# PEFT's own tests are fetched while the first command collects, before two workers ask for them.
test: $(READY)
	$(BIN)/python -m pytest tests/conformance --collect-only > /dev/null
	$(BIN)/python -m pytest tests -m "not slow" -n 2

conformance: $(READY)
	$(BIN)/python -m pytest tests/conformance

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)
	$(BIN)/python eval/bench_speed.py

yardstick: $(READY)
	$(BIN)/python eval/yardstick.py

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo_output
