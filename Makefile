# make demo    install into .venv once, then align the embedded model (no download of weights)
# make test    all tests          make lint    ruff          make types   pyright
# make clean   caches and builds  make distclean    the same and .venv
#
# PYTHON=python3.12 picks another interpreter; PIP_ARGS is handed to the installer (another package index, say).

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types install clean distclean
.DEFAULT_GOAL := demo

# waiting threads sleep: two that spin make the demo ten times slower as soon as anything else runs beside it
demo: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m trainer demo

test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright --pythonpath $(BIN)/python

install: $(INSTALLED)

# torch and torchvision go in with one command, so that the installer picks two that fit each other.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(sys.version_info < (3, 10) and \
	"Python " + v + " is too old; 3.10 or newer is needed. Name one: make PYTHON=python3.12")'
	@if command -v uv >/dev/null; then \
		set -x; uv venv --allow-existing --python $(PYTHON) $(VENV) && \
		uv pip install --python $(BIN)/python $(PIP_ARGS) -e '.[dev]'; \
	else \
		set -x; $(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --quiet --upgrade pip && \
		$(BIN)/python -m pip install $(PIP_ARGS) -e '.[dev]'; \
	fi
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .coverage
	find . -name .git -prune -o -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
