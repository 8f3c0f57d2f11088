"""Load the extrapolated model into transformers with no files between: python transformers_in_memory.py BASE ALIGNED"""

import sys

import torch
from transformers import AutoConfig, LlamaForCausalLM

from lox_stream import stream

base, aligned = sys.argv[1:3]
config = AutoConfig.from_pretrained(aligned)
model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=dict(stream(base, aligned)), dtype="auto")

words = torch.arange(8).reshape(1, 8)
with torch.no_grad():
    print(model.dtype, tuple(model(words).logits.shape))
