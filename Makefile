# Everything runs in .venv, which each target makes or reuses. `make quickstart` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal
CONFIG ?= recipes/configs/quickstart.yaml

.PHONY: quickstart test test-all quality style docs bench clean

quickstart: $(VENV)/.installed-demo
	$(BIN)/python recipes/data/docstrings.py out/docstrings
	$(BIN)/python recipes/owner_warmup.py --config recipes/configs/quickstart_owner.yaml
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu \
		recipes/sequence_classification.py --config $(CONFIG) --overwrite

# Something of everything, for whoever is changing something; `test-all` has the rest, and is what CI runs.
test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed-test
	$(PYTEST)

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in out/site: open out/site/index.html. A warning or a broken link fails.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.run $(BENCH)

clean:
	rm -rf out build dist *.egg-info

# An extra is installed anew only when what it depends on has changed.
$(VENV)/.installed-%: setup.cfg constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=24' 'setuptools>=77'
