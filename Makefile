# Two commands on a fresh machine: `make quickstart` and `make test`. Needs Python >= 3.11, nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
SEED ?= 0
# What the tests want installed; with `test,tpu` they also compile for TPUs, which takes no TPU but 700 MB.
TEST_EXTRAS ?= test
# How a test process shares the machine; tests are many small compilations.
PYTEST_FLAGS ?= -n 2 --dist worksteal
FAULTS ?= 100

export JAX_PLATFORMS ?= cpu

.PHONY: quickstart test torture lint types docs install clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m quietstar_jax.train --config configs/quickstart.py --config.workdir=$(RUN) --config.seed=$(SEED)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# Random faults over every command that writes: minutes. docs/reliability.md has the figures of the last long run.
torture: $(VENV)/.installed-test
	$(BIN)/python -m tests.torture --faults $(FAULTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy quietstar_jax docs

docs: $(VENV)/.installed
	$(BIN)/python docs/configuration.py > docs/configuration.md
	$(BIN)/python docs/objectives.py

install: $(VENV)/.installed

# A changed dependency makes a new environment: nothing works by accident of what was installed before.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Say which: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[$(TEST_EXTRAS)]
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
