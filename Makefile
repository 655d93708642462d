# `make demo` and `make test` set up everything they need first; a second run finds it in place.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP_FILES = $(shell find csrc bench tests -name '*.h' -o -name '*.inc' -o -name '*.cpp' -o -name '*.cu*')

EXAMPLES := sentiment names tagging digits forecast generate translate gradients rl distributed \
	denoise

.PHONY: help demo examples test test-full lint format bench docs build gpu-check clean distclean
help:
	@echo "make demo       train a character model with nn.LSTM and with lstm_fused, side by side"
	@echo "make examples   every system of examples/, small; tables and plots under build/examples"
	@echo "make test       lint and tests, 8 to 15 minutes on two cores; without the CUDA library"
	@echo "make test-full  the other tests: exhaustive, random, compiled for long; and CUDA's"
	@echo "make bench      the speed table, kept with its chart under bench/results"
	@echo "make docs       the documentation as a site, build/docs/index.html"
	@echo "make gpu-check  what needs a CUDA device, with the python that is PYTHON; emulation without one"
	@echo "make lint       ruff and clang-format, checking only"
	@echo "make format     ruff and clang-format, rewriting files"
	@echo "make build      set-up and build alone"
	@echo "make wheel      a wheel for other machines, audited and tested; left in build/wheels"
	@echo "make clean      remove build products; make distclean removes $(VENV) too"
	@echo "options: PYTHON=python3.12, CXX=clang++, ARGS='...' for the command that demo, test, bench run"

demo: build
	@$(BIN)/python -m examples.char_lm $(ARGS)

examples: build
	@for name in $(EXAMPLES); do $(BIN)/python -m examples.$$name --quick $(ARGS) || exit 1; done

PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint $(STAMPS)/build-cpu
	$(PYTEST) $(ARGS)

test-full: build
	$(PYTEST) -m "full or cuda" $(ARGS)

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP_FILES) && echo "clang-format: all C++ files are formatted"

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

bench: build
	@$(BIN)/python -m bench --memory --save $(ARGS)

# Any warning is an error.
docs: build
	$(BIN)/python -m sphinx -b html -n -W --keep-going -q -E -d build/doctrees docs build/docs
	@echo "see build/docs/index.html"

build: $(STAMPS)/build

wheel: $(STAMPS)/dev
	$(BIN)/python tests/packaging/wheels.py $(ARGS)

# With PYTHON as it is, no set-up: such a machine has its own torch, and may have no network.
gpu-check:
	$(PYTHON) tests/cuda/gpu_check.py $(ARGS)

clean:
	rm -rf build *.egg-info lstm_fused/*.so $(STAMPS)/build* .pytest_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV)

define require
@$(1) >/dev/null 2>&1 || { echo "error: $(2)" >&2; exit 1; }
endef

$(STAMPS)/venv:
	$(call require,command -v "$(PYTHON)",no $(PYTHON) here: install Python 3.10 or later or set PYTHON)
	$(call require,$(PYTHON) -c 'import sys; assert sys.hexversion >= 0x30a0000',$(PYTHON) is older than 3.10: set PYTHON to a newer one)
	$(call require,$(PYTHON) -c 'import ensurepip; import venv',$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv))
	$(call require,$(PYTHON) -c 'import sysconfig as s; open(s.get_path("include") + "/Python.h")',Python.h is missing: install it (Debian and Ubuntu: apt install python3-dev))
	$(call require,command -v $(firstword $(CXX)),no C++ compiler $(firstword $(CXX)): install one (Debian and Ubuntu: apt install g++) or set CXX)
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch first and by itself, so that no other package's requirement chooses its version.
$(STAMPS)/dev: requirements-dev.txt | $(STAMPS)/venv
	$(PIP) install $$(grep '^torch==' requirements-dev.txt)
	$(PIP) install --quiet -r requirements-dev.txt
	@touch $@

# Folders are listed too, so that a file added to or taken from csrc/ also rebuilds.
SOURCES := setup.py pyproject.toml $(shell find csrc)
$(STAMPS)/build: $(SOURCES) $(STAMPS)/dev
	@echo "building the kernels; where nvcc is, ten minutes when all of them are new"
	$(PIP) install --quiet --no-build-isolation --no-deps -e .
	@touch $(STAMPS)/build-cpu $@

# Without the CUDA library, which takes longer than the rest; one of older sources is removed.
$(STAMPS)/build-cpu: $(SOURCES) $(STAMPS)/dev
	@echo "building the CPU kernels, 3 to 7 minutes when all of them are new"
	@rm -f lstm_fused/_C_cuda*.so $(STAMPS)/build
	LSTM_FUSED_CUDA=0 $(PIP) install --quiet --no-build-isolation --no-deps -e .
	@touch $@
