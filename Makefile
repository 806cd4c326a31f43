# make demo       install into .venv once, then align the embedded model (no download of weights)
# make test       the tests                   make test-fast   all but the slow ones, about a minute
# make test-thorough   the few that `make test` leaves out, a minute or more each
# make torture    200 random kills and signals: resumed runs equal uninterrupted ones
# make lint       ruff                        make types       pyright
# make clean      remove caches and builds    make distclean   the same and .venv
#
# PYTHON=python3.12 selects another interpreter; PIP_ARGS is passed to the installer, as in PIP_ARGS='-c constraints.txt'.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-fast test-thorough torture lint types install clean distclean
.DEFAULT_GOAL := demo

# OpenMP's idle threads spin by default, which slows everything down tenfold as soon as the cores are shared, as tests do
test test-fast test-thorough torture: export OMP_WAIT_POLICY := passive

demo: install
	$(BIN)/python -m trainer demo

test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not thorough"

test-fast: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-thorough: install
	$(BIN)/python -m pytest -q -n 2 -m thorough

torture: install
	$(BIN)/python tests/support/torture.py --kills 200

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright --pythonpath $(BIN)/python

install: $(INSTALLED)

# torch and torchvision are installed by one command, so that the installer picks matching versions.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(sys.version_info < (3, 10) and \
	"Python " + v + " is too old: 3.10 or newer is needed. Select one with make PYTHON=python3.12")'
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
