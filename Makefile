# Every target makes its own environment first; a bare clone needs Python >= 3.11, make and git.
BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest
WORKERS ?= 2

# compiled programs are kept between runs: half of a short run is compilation
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

.PHONY: help setup run test test-slow test-slurm test-all lint format types bench docs lock clean distclean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY) ## the environment, in .venv
$(READY): requirements/py311.txt requirements/py312.txt pyproject.toml scripts/setup.sh
	@scripts/setup.sh

run: $(READY) ## the whole chain on the embedded climate: data, training, scenario, scores, report
	$(BIN)/twinsim run $(ARGS)

# programs that run once are not worth LLVM's pains, which take longer than they save
test test-slow test-slurm test-all: export XLA_FLAGS := --xla_backend_optimization_level=0 $(XLA_FLAGS)

test: $(READY) ## the quick tests
	$(PYTEST) -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(READY) ## the slow tests alone
	$(PYTEST) -m "slow and not slurm" -n $(WORKERS) --dist loadfile $(ARGS)

test-slurm: $(READY) ## the tests on a real SLURM of two nodes; needs root, slurm-wlm and munge, and says so where they are not
	$(PYTEST) -m slurm $(ARGS)

test-all: $(READY) ## every test; those that need SLURM are skipped where there is none
	$(PYTEST) -m "" -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(READY) ## style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY) ## puts the formatting right
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(READY) ## type check
	$(BIN)/mypy

bench: $(patsubst benchmarks/%.py,bench-%,$(filter-out %_torch.py,$(wildcard benchmarks/[a-z]*.py))) ## every benchmark; bench-climate: one of them

bench-%: benchmarks/%.py $(READY)
	$(BIN)/python $< $(ARGS)

docs: $(READY) ## the pages of docs/ and the reference of every module, in site/
	$(BIN)/properdocs build --quiet --clean --site-dir site
	MUJOCO_GL=disabled $(BIN)/pdoc --docformat google --output-directory site/api twinsim domains generators
	@echo "open site/index.html"

# pinned and hashed, without the address of any registry; needs uv
lock: ## requirements/*.txt anew from pyproject.toml
	for minor in 11 12; do \
	  { echo "# made by 'make lock': everything that twinsim[dev] needs on Python 3.$$minor"; \
	    uv pip compile pyproject.toml --extra dev --python-version 3.$$minor --universal --fork-strategy fewest \
	      --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate --quiet; \
	  } > requirements/py3$$minor.txt.new && mv requirements/py3$$minor.txt.new requirements/py3$$minor.txt || exit 1; \
	done
	@! grep -n "://" requirements/*.txt

clean: ## removes what the tools made; results in out/ stay
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .jax_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## removes the environment too
	rm -rf .venv
