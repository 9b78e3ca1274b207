# Each target makes .venv itself when it is missing or older than what it is made from.
PYTHON ?= python3

.PHONY: quickstart test check fix

quickstart: .venv/.stamp
	.venv/bin/python examples/fashion_mnist/quickstart.py

# Tests marked slow or gpu are left out; .venv/bin/python -m pytest runs them all.
test: .venv/.stamp
	.venv/bin/python -m pytest -m "not slow and not gpu"

check: .venv/.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

fix: .venv/.stamp
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv/.stamp: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -e '.[dev]'
	touch $@
