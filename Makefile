# `make demo` and `make test` create .venv and install the package; a second call installs nothing.
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
export DOCS_VERSION ?= main

.PHONY: demo figures test test-slow test-peers test-oldest test-newest check format docs links dist benchmark clean

demo: $(VENV)/.installed  ## the linear figure on the bundled photographs
	$(BIN)/python -m reproduce linear_model --seeds 0

figures: $(VENV)/.installed  ## all figures and results/report.html, for seed 0 or make figures SEEDS="0 1 2"; resumes
	$(BIN)/python -m reproduce all $(if $(SEEDS),--seeds $(SEEDS))

test: $(VENV)/.installed-test  ## the default test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.installed-test $(VENV)/.installed-docs  ## the slow tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-peers: $(VENV)/.installed-test $(VENV)/.installed-peers  ## comparisons with other libraries and loggers
	$(BIN)/python -m pytest tests/peers

test-oldest:  ## the default test suite on the oldest supported versions, in a separate environment
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-newest:  ## the default test suite on the newest versions, also above the upper bounds in pyproject.toml
	$(MAKE) .venv-newest/.installed-test VENV=.venv-newest CONSTRAINTS=/dev/null
	.venv-newest/bin/python -m pip install --disable-pip-version-check --upgrade lightning torch torchvision torchmetrics \
		'jsonargparse[signatures]' matplotlib scikit-image scipy tensorboard
	.venv-newest/bin/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.installed-dev  ## formatting, lint, spelling and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-docs  ## the site, in build/site; a warning is an error
	$(BIN)/python -m sphinx -c docs -W --keep-going -q -j auto . build/site

links: $(VENV)/.installed-docs  ## links of the site to other sites; needs the network
	$(BIN)/python -m sphinx -b linkcheck -c docs -q . build/links

dist: .venv-release/.installed  ## sdist and wheel in dist/, checked as for a release
	rm -rf dist
	.venv-release/bin/python -m build
	.venv-release/bin/twine check --strict dist/*
	.venv-release/bin/check-wheel-contents dist
	.venv-release/bin/cffconvert --validate
	.venv-release/bin/repo-review --show err .

benchmark: $(VENV)/.installed  ## ratios against their limits; a failed script does not stop the others
	@status=0; for script in linear training views kernel processes tangents startup folders load; do \
		$(BIN)/python benchmarks/$$script.py || status=1; done; exit $$status

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-release build dist results runs

# ---- set-up ----
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer with venv is needed: install it, or name one with make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check 'pip>=25.1'  # the first version with --group

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e . --group $*
	@touch $(VENV)/.installed $@

.venv-release/.installed: pyproject.toml  # without the package: cffconvert needs an old jsonschema
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install --disable-pip-version-check 'pip>=25.1'
	.venv-release/bin/python -m pip install --disable-pip-version-check --group release
	@touch $@
