"""Write LoX as an adapter, load it in PEFT, switch it on and off, merge it: python peft_adapter.py BASE ALIGNED OUT"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lox_stream import Options, extrapolate

base, aligned, out = sys.argv[1:4]
summary = extrapolate(base, aligned, f"{out}/adapter", options=Options(form="peft"))
print(summary.totals.extrapolated, "matrices in", summary.out)

words = torch.arange(8).reshape(1, 8)
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
    before = model(words).logits
    with_lox = PeftModel.from_pretrained(model, summary.out)
    on = with_lox(words).logits
    with with_lox.disable_adapter():
        assert torch.equal(with_lox(words).logits, before)

    extrapolate(aligned, summary.out, f"{out}/merged", options=Options(alpha=0.0, dtype="float32"))  # lox-stream apply
    merged = AutoModelForCausalLM.from_pretrained(f"{out}/merged", dtype=torch.float32)(words).logits
print(f"logits differ from the merged model's by {(on - merged).norm() / (merged - before).norm():.1e} of the change")
