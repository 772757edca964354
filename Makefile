# Two commands need nothing but Python >= 3.11 and make:
#   make train   trains HalfCheetah-v5 with the shipped configuration
#   make test    runs the test suite
# Each sets up .venv first if it is not there.
PYTHON ?= python3
ENV := HalfCheetah-v5
ARGS :=
BIN := .venv/bin
READY := .venv/.ready

# ENV and ARGS are taken from the command line only: some shells export an ENV of their own.
.PHONY: train test check wheel clean

train: $(READY)
	$(BIN)/python -m scripts.train $(ENV) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

check: $(READY)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(READY)  ## the built wheel, alone in an empty environment
	bash .ci/wheel

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	@echo "Setting up .venv, once; it takes a minute or more"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv dist build
