# make help lists the targets. PYTHON=python3.12 chooses the Python, ARGS="..." goes to the command.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

TORCH := torch==2.13.0
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*/* csrc/*/*/*)

# A PyTorch that the chosen Python already has, such as one built for its GPU, is kept.
CHECK_PYTHON := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
WRONG_PYTHON := fastdreamer needs Python 3.11 to 3.13 (make PYTHON=python3.12), but $(PYTHON) is
CHECK_TORCH := import sys, importlib.metadata as m; \
	v = [d.version for d in m.distributions(name="torch")] or ["0.0"]; \
	sys.exit([int(x) for x in v[0].split(".")[:2]] < [2, 11])

.PHONY: help train test lint bench clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1: /p' Makefile

train: $(VENV)/.train  ## train on Atari 100k (ARGS="--task MsPacman --seed 1")
	$(VENV)/bin/python -m fastdreamer.train --preset atari100k $(ARGS)

test: $(VENV)/.test  ## run the tests (ARGS="-k lambda_return")
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(VENV)/.test  ## check style, types and the README's tables
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m bench.table --check

bench: $(VENV)/.test  ## measure operators and whole updates, append to bench/results/
	$(VENV)/bin/python -m pytest bench/operators.py $(ARGS)
	$(VENV)/bin/python -m bench.update --recipe 2023 --rivals installed
	$(VENV)/bin/python -m bench.update --recipe 2025 --rivals installed --obs vector

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info kernels/*.so .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch:
	@$(PYTHON) -c '$(CHECK_PYTHON)' || { echo "$(WRONG_PYTHON) $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@if $(PYTHON) -c '$(CHECK_TORCH)'; then \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
		$(PYTHON) -m venv $(VENV); \
	fi
	@$(VENV)/bin/python -c '$(CHECK_TORCH)' || $(VENV)/bin/python -m pip install $(TORCH)
	@touch $@

$(VENV)/.train: $(VENV)/.torch $(SOURCES)
	$(VENV)/bin/python -m pip install -e .
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(VENV)/bin/python -m pip install -e '.[test]'
	@touch $(VENV)/.train $@
