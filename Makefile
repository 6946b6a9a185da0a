# What CI checks, a target each; `make check` is all of it. `make check PYTEST=true` where the tests have just run.
.PHONY: check format lint types contracts tests docs
PYTEST ?= pytest

check: format lint types contracts tests docs

format:
	ruff format --check .

lint:
	ruff check .

types:
	mypy

contracts:
	lint-imports

tests:
	$(PYTEST)

docs:
	$(PYTEST) tests/test_docs.py tests/test_site.py tests/test_examples.py
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict --site-dir build/site
