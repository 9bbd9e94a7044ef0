# make            lint, types and tests
# make demo       the main job on the fixtures, from nothing
# make test       the tests, on all cores (at most 8), without the slow ones
# make test-all   the slow ones too, as CI runs them
# make soak       runs that are killed at every moment, and at once, for two minutes (SOAK=3600: for an hour)
# make load       what is too large for the suite: a million keys, 10,000 shards (LOAD='keys shards' chooses)
# make fuzz       bytes at random against every command, for a minute (FUZZ='--seconds 600': for ten)
# make docs       the site of docs/, into site/
# make bench      speed and memory beside other tools (bench/README.md)
# make bench-remap  how well mappings are found, into docs/benchmark-mapping.md (bench/remap/README.md)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
FIXTURES := fixtures

.PHONY: all demo test test-all lint types smoke golden docs fixtures fuzz soak load bench bench-full bench-remap clean
all: lint types test

# The tool alone: no torch, seconds to install.
$(VENV)/.tool: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e .
	@touch $@

# What the tests need: torch at the pinned version, before anything that depends on it.
$(VENV)/.dev: $(VENV)/.tool
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.tool
	@rm -f merged.pth
	$(BIN)/ckptool inspect $(FIXTURES)/resnet_nested.pth --depth 1
	@echo
	$(BIN)/ckptool diff $(FIXTURES)/resnet_new.pth $(FIXTURES)/resnet_old.pth; test $$? -eq 1
	@echo
	$(BIN)/ckptool filter --match $(FIXTURES)/resnet_new.pth $(FIXTURES)/resnet_old.pth -o merged.pth
	@echo
	$(BIN)/ckptool diff merged.pth $(FIXTURES)/resnet_old.pth --values; test $$? -eq 1

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# The workers, and the commands that the tests start, share what is compiled, wherever the environment forbids it.
test test-all: export PYTHONDONTWRITEBYTECODE :=

test: $(VENV)/.dev
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/.dev
	$(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# Rewrites the outputs in README.md, docs and tests/golden, the reference of JSON and the picture of the house; review the difference before committing it.
golden: $(VENV)/.dev
	$(BIN)/python docs/site/json_reference.py
	$(BIN)/python docs/site/house.py
	$(BIN)/python -m tests.transcripts --write

# The site of docs/: mkdocs refuses a link or anchor that leads nowhere, and a page that is not in mkdocs.yml.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.tool
	$(PIP) install -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict --quiet

fixtures: $(VENV)/.dev
	$(BIN)/python fixtures/make.py

# atheris is large and has no wheel for every Python: only this needs it.
fuzz: $(VENV)/.dev
	$(PIP) install -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz $(FUZZ)

SOAK ?= 120
soak: $(VENV)/.dev
	$(BIN)/python tests/soak.py all $(SOAK)

load: $(VENV)/.dev
	$(BIN)/python tests/load.py $(LOAD)

# What they say is in bench/README.md; the full one is for release notes. BENCH='--dir /on/a/disk --json figures.json'
bench: $(VENV)/.dev
	$(BIN)/python bench/run.py $(BENCH)

bench-full: $(VENV)/.dev
	$(BIN)/python bench/run.py --full $(BENCH)

# One of the simple methods needs scipy, which nothing else does. REMAP='--set ds --verbose' looks at one set instead.
REMAP ?= --set all --page docs/benchmark-mapping.md --jobs 2
bench-remap: $(VENV)/.dev
	$(PIP) install scipy
	$(BIN)/python -m bench.remap.run $(REMAP)

# The wheel, built from the sdist, in an environment of its own, without torch and without anything of development: with the pinned versions,
# with the oldest typer and click that pyproject.toml allows, and with the newest.
TYPERS := 'typer==0.20.0 click==8.1.8' '--upgrade typer'
smoke:
	@rm -rf .smoke && $(PYTHON) -m venv .smoke
	.smoke/bin/python -m pip --disable-pip-version-check --quiet install build
	.smoke/bin/python -m build --outdir .smoke/dist . >/dev/null
	.smoke/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt .smoke/dist/*.whl
	.smoke/bin/python tests/smoke.py $(FIXTURES)
	for typer in $(TYPERS); do \
	  .smoke/bin/python -m pip --disable-pip-version-check --quiet install $$typer && \
	  .smoke/bin/python tests/smoke.py $(FIXTURES) || exit 1; \
	done
	@rm -rf .smoke

clean:
	rm -rf $(VENV) .smoke build dist site merged.pth
