PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
REQUIREMENTS := setup.py $(wildcard requirements/*.txt)

.PHONY: install quickstart test test-engines engine-sglang engine-vllm lint docs clean

install: $(VENV)/.installed

# torch first, so that the CPU build is there before any package asks for it
$(VENV)/.installed: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements/torch-cpu.txt
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/python examples/quickstart/run.py

test: install
	$(BIN)/python -m pytest tests --ignore tests/engines --numprocesses 2 --dist loadfile

# the real engines, each in an environment of its own outside the clone
engine-sglang engine-vllm: engine-%:
	$(PYTHON) tools/build_engine.py $*

test-engines: install engine-sglang engine-vllm
	$(BIN)/python -m pytest tests/engines

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python -m megarl.config.explain > docs/configuration.md
	$(BIN)/python -m megarl.metrics > docs/metrics.md

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
