# Each target makes .venv itself when it is missing or older than what it is made from.
PYTHON ?= python3

# The tests of a file run in one process; tests/conftest.py says how many there are, and which files come first.
TESTS = pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

.PHONY: quickstart test test-lowest check fix docs dist

quickstart: .venv/.stamp
	.venv/bin/python examples/fashion_mnist/quickstart.py

# Tests marked slow or gpu are left out; .venv/bin/python -m pytest runs them all.
test: .venv/.stamp
	.venv/bin/python -m $(TESTS)

# The same with the lowest version that setup.cfg allows of each package, and Python 3.11.
test-lowest: .venv-lowest/.stamp
	.venv-lowest/bin/python -m $(TESTS)

check: .venv/.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

fix: .venv/.stamp
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/python docs/options.py

# The site, in site/. Nothing is published.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# Source distribution and wheel, in dist/. REPOSITORY_URL makes the README's links absolute (CONTRIBUTING.md).
dist: .venv/.dist
	rm -rf build dist
	REPOSITORY_URL=$(REPOSITORY_URL) .venv/bin/python -m build --no-isolation
	.venv/bin/twine check --strict dist/*

.venv/.stamp: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -e '.[dev]'
	touch $@

.venv-lowest/.stamp: setup.cfg
	python3.11 -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --disable-pip-version-check uv
	.venv-lowest/bin/python -m uv pip install --python .venv-lowest --resolution lowest-direct -e .
	.venv-lowest/bin/python -m uv pip install --python .venv-lowest -e '.[dev]'
	touch $@

.venv/.docs .venv/.dist: .venv/.%: .venv/.stamp
	.venv/bin/python -m pip install --disable-pip-version-check -e '.[$*]'
	touch $@
