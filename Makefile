# Two commands, each of which makes its own environment in .venv: `make table` and `make test`.
PYTHON ?= python3
VENV ?= .venv

.PHONY: table test clean

table: $(VENV)/.ready  ## train the scan ablation (Table 5) on the embedded digits and print its table
	$(VENV)/bin/python cli.py fit --config experiments/ablate_scans.yaml

test: $(VENV)/.ready  ## lint, types and tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:  ## remove the environment and caches; results stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
