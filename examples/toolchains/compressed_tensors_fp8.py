"""LoX and FP8 in one pass over the shards: python compressed_tensors_fp8.py BASE ALIGNED OUT (with llm-compressor)"""

import sys

from llmcompressor import model_free_ptq

from lox_stream.for_compressed_tensors import LoxConverter

base, aligned, out = sys.argv[1:4]
model_free_ptq(
    model_stub=aligned,
    save_directory=out,
    scheme="FP8_DYNAMIC",
    ignore=["lm_head", "re:.*embed_tokens$"],
    converter=LoxConverter(base, aligned),
    max_workers=1,
    device="cpu",
)
