"""The files of examples/toolchains, each run with the real other program on a pair that transformers made and saved.

llm-compressor has an environment of its own, for it holds transformers and compressed-tensors back: `make examples`.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.examples, pytest.mark.filterwarnings("default")]  # warnings of other libraries are theirs
transformers = pytest.importorskip("transformers", reason="`make examples` has an environment with it")

from lox_stream import Options, extrapolate, stream  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples" / "toolchains"
TOOLS = Path(__file__).parent / "tools"
VOCABULARY = 288
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
TEXT = "the bird sings where the river bends, and the wind sings there"


def needs(package: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"{package} is in another environment of `make examples`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base and aligned, a Llama of two layers in bfloat16, saved by transformers."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=500_000.0,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        tie_word_embeddings=False,
    )
    base = transformers.LlamaForCausalLM(config).bfloat16()
    aligned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in aligned.parameters():
            if weight.ndim == 2:
                change = torch.randn(weight.shape[0], 3) @ torch.randn(3, weight.shape[1])
                weight += (0.01 * change + 0.001 * torch.randn(weight.shape)).bfloat16()
    base.save_pretrained(folder / "base")
    aligned.save_pretrained(folder / "aligned", max_shard_size="100KB")
    tokenizer().save_pretrained(folder / "aligned")
    return folder


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Of the kind that Llama 3 has: words of bytes, merged by BPE, and a token at the beginning of each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 2, initial_alphabet=letters, show_progress=False)
    made.train_from_iterator([TEXT] * 9, trainer)
    assert made.get_vocab_size() == VOCABULARY - 2
    made.add_special_tokens([BEGIN, END])
    first = [(BEGIN, VOCABULARY - 2)]
    made.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=first)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BEGIN, eos_token=END)


def run(folder: Path, *words: object) -> str:
    """A command in the folder, without a network; what it prints."""
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    ran = subprocess.run(
        [str(word) for word in words], cwd=folder, env=offline, capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def example(folder: Path, name: str, *words: object) -> str:
    return run(folder, sys.executable, EXAMPLES / name, *words)


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(8).reshape(1, 8)).logits


@needs("peft")
def test_transformers_loads_what_is_streamed(folder):
    assert f"torch.bfloat16 (1, 8, {VOCABULARY})" in example(folder, "transformers_in_memory.py", "base", "aligned")
    out = extrapolate(folder / "base", folder / "aligned", folder / "out").out
    config = transformers.AutoConfig.from_pretrained(folder / "aligned")
    tensors = dict(stream(folder / "base", folder / "aligned"))
    model = transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(torch.arange(8).reshape(1, 8)).logits, logits(out))


@needs("peft")
def test_peft_loads_the_adapter_switches_it_and_agrees_with_the_merged_model(folder):
    said = example(folder, "peft_adapter.py", "base", "aligned", "with-peft")
    assert "16 matrices" in said
    assert float(said.split("differ from the merged model's by ")[1].split()[0]) < 1e-3


@needs("mergekit")
def test_mergekit_merges_by_lox_to_the_bits_of_run(folder):
    script = Path(sys.executable).with_name("lox-mergekit")
    run(folder, script, EXAMPLES / "mergekit_lox.yaml", "merged", "--no-copy-tokenizer", "--no-write-model-card")
    merged = load_file(folder / "merged" / "model.safetensors")
    wide = Options(dtype="float32")
    right = dict(stream(folder / "base", folder / "aligned", options=wide))
    assert merged.keys() == right.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in right.items())
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}


@needs("mergekit")
def test_the_method_is_an_object_that_mergekit_takes(folder):
    from mergekit.merge_methods import merge_state_dicts

    from lox_stream.for_mergekit import lox_method

    sides = {
        side: {name: t for path in (folder / side).glob("*.safetensors") for name, t in load_file(path).items()}
        for side in ("base", "aligned")
    }
    parameters = {"rank": 2, "alpha": 0.5}
    made = merge_state_dicts(sides, lox_method(), base="base", parameters=parameters, dtype=torch.float32)
    how = Options(dtype="float32", **parameters)
    right = dict(stream(folder / "base", folder / "aligned", options=how))
    assert all(torch.equal(made[name], tensor) for name, tensor in right.items())


@needs("gguf")
@pytest.mark.parametrize(("kind", "slack"), [("F16", 1e-3), ("BF16", 4e-3), ("Q8_0", 8e-3)])
def test_a_gguf_file_holds_what_run_writes(kind, slack, folder):
    """Each tensor read back by `gguf`; rows of q and k stand as llama.cpp has them."""
    import gguf

    example(folder, "gguf_stream.py", "base", "aligned", f"{kind}.gguf", kind)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / f"{kind}.gguf").tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    right = dict(stream(folder / "base", folder / "aligned", options=Options(dtype="float32")))
    assert len(held) == len(right)
    for name, tensor in right.items():
        stored = held[names.get_name(name, try_suffixes=(".weight",))]
        found = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type)).view(tensor.shape)
        if "q_proj" in name or "k_proj" in name:
            heads = 4 if "q_proj" in name else 2
            half = tensor.shape[0] // heads // 2
            found = found.view(heads, half, 2, -1).transpose(1, 2).reshape(tensor.shape)
        assert stored.tensor_type.name == ("F32" if tensor.ndim == 1 else kind)
        assert float((found - tensor).norm()) <= slack * float(tensor.norm()), name


@needs("xllamacpp")
@pytest.mark.parametrize(("kind", "slack"), [("F16", 0.004), ("BF16", 0.04), ("Q8_0", 0.04)])
def test_llama_cpp_reads_it_and_says_what_transformers_says(kind, slack, folder):
    """The text in tokens, and the next one's probabilities: to `slack` of what LoX changes of them."""
    example(folder, "gguf_stream.py", "base", "aligned", f"{kind}.gguf", kind)
    said = json.loads(run(folder, sys.executable, TOOLS / "by_llama_cpp.py", f"{kind}.gguf", TEXT).splitlines()[-1])
    words = transformers.AutoTokenizer.from_pretrained(folder / "aligned")(TEXT, return_tensors="pt").input_ids
    assert said["tokens"] == words.shape[1]
    wide = dict(stream(folder / "base", folder / "aligned", options=Options(dtype="float32")))
    aligned = transformers.LlamaForCausalLM.from_pretrained(folder / "aligned", dtype=torch.float32)
    config = aligned.config
    lox = transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=wide, dtype=torch.float32)
    with torch.no_grad():
        before, right = (model(words).logits[0, -1].log_softmax(-1) for model in (aligned, lox))
    away = float((torch.tensor(said["logprobs"]) - right).norm() / (right - before).norm())
    assert away < slack


@needs("gguf")
@pytest.mark.parametrize("said", [{"rope_parameters": {"rope_type": "llama3"}}, {"rope_scaling": {"factor": 8.0}}])
def test_a_llama_whose_rope_is_scaled_gets_no_gguf_file_that_would_be_wrong(said, tmp_path):
    config = {"num_hidden_layers": 1, "num_attention_heads": 1, "rope_theta": 500_000.0} | said
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = sys.executable, str(EXAMPLES / "gguf_stream.py"), str(tmp_path), str(tmp_path), str(tmp_path / "out.gguf")
    refused = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert (refused.returncode, "rope is scaled" in refused.stderr) == (1, True), refused.stderr


@needs("peft")
def test_checkpoints_of_fsdp_are_read_either_way(folder):
    import torch.distributed.checkpoint as dcp

    for side in ("base", "aligned"):
        tensors = {n: t for path in (folder / side).glob("*.safetensors") for n, t in load_file(path).items()}
        dcp.save({"model": tensors}, checkpoint_id=folder / f"{side}-dcp", no_dist=True)
    assert "16 matrices" in example(folder, "dcp_inputs.py", "base-dcp", "aligned-dcp", "from-dcp", "model.")
    right = dict(stream(folder / "base", folder / "aligned"))
    for found in ("in-memory.safetensors", "lox/model-00001-of-00001.safetensors"):
        tensors = load_file(folder / "from-dcp" / found)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in right.items())


@needs("compressed_tensors")
def test_compressed_tensors_converts_with_lox_on_the_way(folder):
    """Its own loop over shards and threads, and its validation on meta tensors; the result is what `run` writes."""
    from compressed_tensors.entrypoints.convert import convert_checkpoint

    from lox_stream.for_compressed_tensors import LoxConverter

    out = folder / f"converted-{transformers.__version__}"
    converter = LoxConverter(folder / "base", folder / "aligned")
    convert_checkpoint(folder / "aligned", out, converter, max_workers=2, device="cpu")
    right = dict(stream(folder / "base", folder / "aligned"))
    made = {name: t for path in out.glob("*.safetensors") for name, t in load_file(path).items()}
    assert made.keys() == right.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in right.items())
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@needs("llmcompressor")
def test_lox_and_fp8_happen_in_one_pass_and_the_output_loads(folder):
    """The FP8 numbers are those of the extrapolated weights, not of aligned's."""
    example(folder, "compressed_tensors_fp8.py", "base", "aligned", "fp8")
    held = {name: t for path in (folder / "fp8").glob("*.safetensors") for name, t in load_file(path).items()}
    right = dict(stream(folder / "base", folder / "aligned"))
    before = {n: t for path in (folder / "aligned").glob("*.safetensors") for n, t in load_file(path).items()}
    linear = [name for name in right if name.endswith("proj.weight")]
    assert len(linear) == 14
    for name in linear:
        assert held[name].dtype == torch.float8_e4m3fn
        found = held[name].float() * held[f"{name}_scale"].float()
        error = float((found - right[name].float()).norm() / right[name].float().norm())
        assert error < 0.04, name
        moved = right[name].float() - before[name].float()
        assert float(((found - before[name].float()) * moved).sum()) > 0.5 * float(moved.square().sum()), name
    wide = extrapolate(folder / "base", folder / "aligned", folder / "plain", options=Options(dtype="float32")).out
    away = float((logits(folder / "fp8") - logits(wide)).norm() / logits(wide).norm())
    assert away < 0.2
