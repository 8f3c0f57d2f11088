# Everything runs in virtual environments that are made here, from constraints.txt: nothing but python3 (3.11 or newer)
# and make has to be installed. `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip --disable-pip-version-check --quiet --quiet
DEV := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"])
WHEEL := build/wheel
HUB := pair_on_the_hub or gated or cut_connection or offline or pushed or breaks or network# with an older huggingface_hub
OFFLINE = $(shell unshare -rn true 2>/dev/null && echo unshare -rn)# a shell without any network, on Linux
BENCH ?=
JOBS ?= 2
FUZZ ?=
TORTURE ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check docs site compat examples browser torture torture-short fuzz kernels bench size wheel clean
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/ready ## make a small pair of checkpoints, extrapolate it, show what came out
	@$(BIN)/lox-stream demo

test: $(VENV)/ready-dev ## the tests: seconds each, no GPU, no network; JOBS=N of them at a time
	$(BIN)/pytest -n $(JOBS) --dist worksteal

compat: .venv-compat/ready ## models of 63 architectures, and adapters of PEFT, saved by their libraries, extrapolated and loaded again
	.venv-compat/bin/pytest -m compat tests/test_architectures.py tests/test_peft.py tests/test_adapter_in_peft.py tests/test_fp8_formats.py

examples: .venv-compat/ready .venv-llmcompressor/ready ## examples/toolchains with the real other programs; models on a hub, in buckets, on the web
	.venv-compat/bin/pytest -m examples tests/test_toolchains.py tests/test_hub.py tests/test_cloud.py tests/test_streaming.py
	.venv-llmcompressor/bin/pytest -m examples tests/test_toolchains.py tests/test_hub.py -k "test_toolchains or $(HUB)"

torture: $(VENV)/ready-dev ## runs killed, without power, disk, memory or inputs, for half an hour; TORTURE="--help" lists the options
	$(BIN)/pytest -m torture
	$(BIN)/python benchmarks/torture.py $(TORTURE)

torture-short: $(VENV)/ready-dev ## the same in three minutes, after the tests that take minutes
	$(BIN)/pytest -m torture
	$(BIN)/python benchmarks/torture.py --minutes 3

fuzz: $(VENV)/ready-dev ## a million damaged and hostile files, some ten minutes; FUZZ="--help" lists the options
	$(BIN)/python benchmarks/fuzz.py $(FUZZ)

docs: $(VENV)/ready-dev ## run the examples of README.md and docs/
	$(BIN)/pytest tests/test_docs.py

site: .venv-docs/ready ## the documentation as a site, build/site/html/index.html: built without network, every link checked
	@rm -rf build/site
	@$(PYTHON) docs/tools/stage_site.py build/site/pages
	@$(if $(OFFLINE),,echo "site: unshare -rn does not work here: the build may see a network")
	@$(OFFLINE) .venv-docs/bin/zensical build --clean --strict
	@$(PYTHON) docs/tools/check_site.py build/site/html

browser: $(VENV)/ready-dev tests/browser-constraints.txt ## the report's page in Chromium, which is installed from Debian where it is not there
	@command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core)
	@$(BIN)/python $(PIP) install -c tests/browser-constraints.txt playwright
	$(BIN)/pytest -m browser tests/test_report.py

kernels: $(VENV)/ready-dev ## compile the GPU kernels for three processors, and hold them to their limits
	$(BIN)/python benchmarks/compile_kernels.py

check: $(VENV)/ready-dev ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@echo "check: types, on the package as it is installed (checkers do not follow the mapping of kernels/)"
	@rm -rf build/flat build/lib build/bdist.*
	@$(BIN)/python $(PIP) install --no-deps --target build/flat .
	cd build/flat && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p lox_stream

demo-real: ## the same on a real model: build its pair once (minutes), extrapolate it, let it answer
test-real: ## the laws of docs/accuracy.md on that pair

bench: $(VENV)/ready-dev ## the figures of docs/performance.md, some minutes; BENCH="--help" lists the options
	$(BIN)/python benchmarks/bench_stream.py $(BENCH)

size: ## lines of each module
	@wc -l lox_stream/*.py kernels/*.py | sort -n

wheel: $(VENV)/ready ## build the wheel, install it elsewhere, run it outside the repository
	@rm -rf $(WHEEL) build/lib build/bdist.*
	@echo "wheel: building"
	@$(BIN)/python $(PIP) wheel --no-deps --wheel-dir $(WHEEL) .
	@echo "wheel: installing $$(ls $(WHEEL)) with its dependencies into $(WHEEL)/venv"
	@$(PYTHON) -m venv $(WHEEL)/venv
	@$(WHEEL)/venv/bin/python $(PIP) install -c constraints.txt $(WHEEL)/*.whl
	@echo "wheel: running it outside the repository"
	@bin=$$PWD/$(WHEEL)/venv/bin && cd / && $$bin/lox-stream --version && $$bin/python -m lox_stream demo \
	  && $$bin/python -c "import lox_stream, lox_stream.kernels as k; print('wheel:', k.__file__)"
	@rm -rf $(WHEEL)/venv

clean: ## remove what was built, the environments too
	rm -rf build dist *.egg-info .cache .venv .venv-compat .venv-docs .venv-llmcompressor .venv-real .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1), expected Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	@echo "make: installing lox-stream into $(VENV), about a minute"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP) install -c constraints.txt --editable .
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready tests/ray-constraints.txt
	@echo "make: installing the tools for tests and checks"
	@$(BIN)/python $(PIP) install -c constraints.txt -c tests/ray-constraints.txt $$($(BIN)/python -c '$(DEV)')
	@touch $@

.venv-compat/ready: constraints.txt tests/compat-constraints.txt pyproject.toml
	@echo "make: installing transformers, diffusers, peft, mergekit, gguf, llama.cpp, ml_dtypes, obstore and moto into .venv-compat"
	@$(PYTHON) -m venv .venv-compat
	@.venv-compat/bin/python $(PIP) install -c constraints.txt -c tests/compat-constraints.txt -e . torch transformers \
	  diffusers peft compressed-tensors mergekit gguf xllamacpp ml_dtypes obstore boto3 "moto[server]" pytest
	@touch $@

.venv-llmcompressor/ready: constraints.txt tests/llmcompressor-constraints.txt pyproject.toml
	@echo "make: installing llm-compressor, with the transformers that it holds back, into .venv-llmcompressor"
	@$(PYTHON) -m venv .venv-llmcompressor
	@.venv-llmcompressor/bin/python $(PIP) install -c constraints.txt -c tests/llmcompressor-constraints.txt -e . \
	  torch transformers llmcompressor pytest
	@touch $@

.venv-docs/ready: constraints.txt docs/tools/constraints.txt
	@echo "make: installing zensical and mkdocstrings into .venv-docs"
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python $(PIP) install -c constraints.txt -c docs/tools/constraints.txt zensical "mkdocstrings[python]" ruff
	@touch $@

include examples/real_pair/real.mk
include benchmarks/robustness/robustness.mk
