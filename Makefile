# make demo   set up .venv and classify the bundled images privately
# make test   set up .venv and run every check and test
# Python 3.11, make and a C compiler are all that is needed.

PYTHON ?= python3.11
VENV ?= .venv
# torch comes first: a bare "torch" may bring several gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
# CrypTen asks for the retired "sklearn" package, so it is installed without its dependencies.
CRYPTEN ?= crypten==0.4.1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml setup.py $(wildcard native/*.c native/*.h)

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/pi-bench run --model demo --images 20 --predictions

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) --no-deps "$(CRYPTEN)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable ".[crypten]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable ".[crypten,report,images,dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
