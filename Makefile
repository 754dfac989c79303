# Two commands do everything on a fresh machine: `make quickstart` and `make test`. Each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
# A file's tests stay together, since they share what is dear to make. Three processes for two cores, a fifth of whose
# time goes to waiting for servers and processes. What measures time runs alone: the slow tests, and those of budgets.
FAST := -m "not slow and not budget" -n 3 --dist loadfile

.PHONY: help quickstart test test-all lint docs bench setup clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

quickstart: .venv/.ready-run  ## set up, then take real text through the whole chain to a served ONNX model
	@$(BIN)/llmctl run specs/quickstart.yaml --to serve

test: .venv/.ready-dev  ## set up, then run the tests (under 12 minutes on two cores)
	@$(BIN)/python -m pytest $(FAST)
	@$(BIN)/python -m pytest -m budget

test-all: .venv/.ready-dev  ## every test, the slow ones too
	@$(BIN)/python -m pytest $(FAST)
	@$(BIN)/python -m pytest -m "budget or slow"

lint: .venv/.ready-dev  ## ruff, mypy, import-linter, the shipped specs, the documented examples
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/llmctl check specs/*.yaml
	@$(BIN)/python -m pytest tests/docs -m "not slow"

docs: .venv/.ready-docs  ## build the documentation into site/
	@$(BIN)/zensical build --clean

bench: .venv/.ready-dev  ## run the benchmarks against their peers; numbers go to benchmarks/RESULTS.md by hand
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

setup: .venv/.ready-dev  ## only set up

clean:  ## remove the environment and every cache, keep .llmctl and exports
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache site

# Interrupted set-ups leave no stamp, so the next `make` goes on where pip stopped.
.venv/.ready-run: pyproject.toml constraints.txt constraints-cpu.txt tools/setup.py
	@$(PYTHON) tools/setup.py all
	@touch $@

.venv/.ready-dev: pyproject.toml constraints.txt constraints-cpu.txt tools/setup.py
	@$(PYTHON) tools/setup.py all,dev,test-browser
	@touch $@ .venv/.ready-run

.venv/.ready-docs: pyproject.toml constraints.txt constraints-cpu.txt tools/setup.py
	@$(PYTHON) tools/setup.py all,dev,docs,test-browser
	@touch $@ .venv/.ready-dev .venv/.ready-run
