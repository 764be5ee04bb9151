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
# A pretrained model (folder or hub id), a folder with GSM8K's train.jsonl and test.jsonl (empty = the hub), and the number
# of test problems that are measured.
REAL_MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
REAL_DATA ?=
REAL_RUN ?= runs/real
REAL_PROBLEMS ?= 48
REAL_STEPS ?= 100

export JAX_PLATFORMS ?= cpu

.PHONY: quickstart real test test-all torture lint types docs install clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m quietstar_jax.train --config configs/quickstart.py --config.workdir=$(RUN) --config.seed=$(SEED)

# A pretrained model learns to think on GSM8K, in REAL_STEPS plain steps (the configuration has 300), without REINFORCE.
# The last table compares the model that thinks with itself without thoughts and with the untouched model, on the first
# $(REAL_PROBLEMS) test problems; the page shows thoughts.
REAL_TEXT = tfds:$(REAL_RUN)/data/gsm8k_text/3.0.0:test
REAL_TEST = --task spans --data $(REAL_TEXT) --limit $(REAL_PROBLEMS) --batch-size 4
REAL_THOUGHTS = --think start:0.01 --reach 4
real: $(VENV)/.installed$(if $(REAL_DATA),,-hub)
	$(BIN)/python -m quietstar_jax.data.build gsm8k_text --data-dir $(REAL_RUN)/data \
	    $(if $(REAL_DATA),$(foreach split,train test,--split $(split)=$(REAL_DATA)/$(split).jsonl))
	$(BIN)/python -m quietstar_jax.evaluate --checkpoint $(REAL_MODEL) --thoughts off $(REAL_TEST) \
	    --records $(REAL_RUN)/untouched.jsonl
	$(BIN)/python -m quietstar_jax.train --config configs/smollm2_gsm8k.py --config.workdir=$(REAL_RUN)/run \
	    --config.seed=$(SEED) --config.model.checkpoint=$(REAL_MODEL) --config.data.data_dir=$(REAL_RUN)/data \
	    '--config.phases[0].steps=$(REAL_STEPS)' '--config.phases[2].steps=0'
	$(BIN)/python -m quietstar_jax.report --checkpoint $(REAL_RUN)/run --data $(REAL_TEXT) --limit 4 \
	    --page-tokens 300 --samples 1 $(REAL_THOUGHTS) --output $(REAL_RUN)/thoughts.html \
	    --picture $(REAL_RUN)/picture.svg
	$(BIN)/python -m quietstar_jax.evaluate --checkpoint $(REAL_RUN)/run $(REAL_TEST) $(REAL_THOUGHTS) \
	    --records $(REAL_RUN)/trained.jsonl --against $(REAL_RUN)/untouched.jsonl --output $(REAL_RUN)/result.json

# All tests that are not marked slow. The slow ones take about as long as all others together.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow"

test-all: $(VENV)/.installed-test
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
	$(BIN)/python docs/api.py > docs/api.md

install: $(VENV)/.installed

# A changed dependency makes a new environment: nothing works by accident of what was installed before.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Say which: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: EXTRAS = $(TEST_EXTRAS)
$(VENV)/.installed-hub: EXTRAS = hub
$(VENV)/.installed-test $(VENV)/.installed-hub: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[$(EXTRAS)]
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
