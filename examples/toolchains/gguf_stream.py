"""Stream the extrapolated tensors into a GGUF file: python gguf_stream.py BASE ALIGNED OUT.gguf [F16|BF16|Q8_0]

For a Llama 3: its tokenizer is written as llama.cpp reads it. One whose rope is scaled (3.1 and later) is refused here.
"""

import json
import sys
from pathlib import Path

import gguf

from lox_stream import Options, stream

base, aligned, out = sys.argv[1:4]
kind = gguf.GGMLQuantizationType[sys.argv[4] if len(sys.argv) > 4 else "Q8_0"]
config = json.loads(Path(aligned, "config.json").read_text())
layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
rope = config.get("rope_parameters") or config  # transformers 5, or 4
if rope.get("rope_scaling") or rope.get("rope_type", "default") != "default":
    sys.exit("its rope is scaled: write the model with lox-stream run, and take llama.cpp's convert_hf_to_gguf.py")
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)

writer = gguf.GGUFWriter(out, "llama", use_temp_file=True)
writer.add_block_count(layers)
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(heads)
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_rope_freq_base(rope["rope_theta"])
writer.add_vocab_size(config["vocab_size"])
writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])

tokens, _scores, types = zip(*gguf.BpeVocab(Path(aligned)).all_tokens(), strict=True)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("llama-bpe")
writer.add_token_list(tokens)
writer.add_token_types(types)
gguf.SpecialVocab(aligned, load_merges=True).add_to_gguf(writer, quiet=True)


def for_rope(array, heads):
    """The rows of q and k as llama.cpp rotates them: pairs that are neighbours, and not half a head apart."""
    rows, *rest = array.shape
    return array.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(array.shape)


for name, array in stream(base, aligned, options=Options(dtype="float32"), framework="numpy"):
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        array = for_rope(array, heads if "q_proj" in name else config["num_key_value_heads"])
    stored = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else kind
    data = gguf.quants.quantize(array, stored)
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=stored)

writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
