# Everything starts here: `make demo` for the whole tool in miniature, `make test` for its proof.
.DEFAULT_GOAL := help
.PHONY: help install lint test test-all demo benchmark gpu clean

VENV := .venv
# Modules, not scripts: an environment that sees the caller's packages lacks their scripts.
BIN := $(VENV)/bin
PYTHON ?= python3
INSTALLED := $(VENV)/.installed
# Cheap tests two at a time; what starts processes of its own runs alone (tests/order.py).
WORKERS := -n 2 --no-loadscope-reorder
INSTALL_INPUTS := setup.cfg pyproject.toml constraints.txt .ci/install

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

install: $(INSTALLED)  ## create .venv and install everything, pinned; instant when nothing changed

$(INSTALLED): $(INSTALL_INPUTS)
	@PYTHON="$(PYTHON)" .ci/install $(VENV)
	@touch $@

lint: $(INSTALLED)  ## formatting, style, types, import contracts
	$(BIN)/python -m black --check .
	$(BIN)/python -m isort --check-only .
	$(BIN)/python -m flake8
	$(BIN)/python -m mypy mmtrain launcher data_shards ray_tune
	$(BIN)/python -c 'from importlinter.cli import lint_imports_command as run; run()'

test: $(INSTALLED)  ## all tests but the soaks, within 20 minutes on 2 idle cores
	$(BIN)/python -m pytest $(WORKERS) -m "not soak and not gpu"

test-all: $(INSTALLED)  ## soaks and full matrices too, more than an hour
	MMTRAIN_FUZZ=40 $(BIN)/python -m pytest $(WORKERS) -m "not gpu"

demo: $(INSTALLED)  ## digits, a tiny LLaVA, a LoRA study and its comparison, on this machine
	$(BIN)/python docs/examples/demo/run_demo.py

benchmark: $(INSTALLED)  ## samples/s beside TRL's SFTTrainer, same model, batches and LoRA
	$(BIN)/python -m benchmarks.single_run --dtype both

# Installs nothing: a machine with a card may have no network, and its packages on PYTHONPATH.
gpu:  ## prove and measure everything on one GPU, within 8 minutes
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu

clean:  ## remove the environment, caches and build outputs; runs and results stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
