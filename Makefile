# Two commands on a fresh machine: `make quickstart` and `make test`. Both make .venv first.
#
# A torch that the chosen Python already has is honoured (the environment then sees that Python's packages); otherwise
# the version of constraints.txt is installed. On Linux that is PyPI's build with CUDA; README says how to get a smaller
# CPU build. Variables: PYTHON (which Python), VENV (where), WORKERS (how many test processes).

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
SOURCES = loraq stages strategies kernels tests benchmarks recipes

.PHONY: quickstart test quick lint wheel figures clean install

quickstart: $(INSTALLED)
	$(BIN)/loraq run recipes/quickstart.toml

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope -q

# Without the longer tests.
quick: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope -q -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# Build the wheel from the source distribution, look at what is in it, and run it away from the sources.
wheel: $(INSTALLED)
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	$(BIN)/check-wheel-contents dist/*.whl
	rm -rf build/wheel && $(BIN)/pip install -q --no-deps --target build/wheel dist/*.whl
	cd build && PYTHONSAFEPATH=1 PYTHONPATH=wheel ../$(BIN)/python -m loraq check quickstart
	cd build && PYTHONSAFEPATH=1 PYTHONPATH=wheel ../$(BIN)/python -m loraq plan quickstart > /dev/null

# The figures that README quotes.
figures: $(INSTALLED)
	$(BIN)/python benchmarks/weight_error.py recipes/tiny-pixart-sigma/transformer --workers 2
	$(BIN)/python benchmarks/weight_error.py recipes/tiny-pixart-sigma/transformer --workers 2 --hadamard

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $$($(PYTHON) -c "import torch" 2> /dev/null && echo --system-site-packages) $(VENV)
	$(BIN)/python -c "import torch" 2> /dev/null || $(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -e ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf build dist out *.egg-info
