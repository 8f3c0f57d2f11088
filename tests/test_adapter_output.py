"""The update as a LoRA adapter: merged again it is what `run` writes, bit by bit; one solve serves many outputs."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from folders import write
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lox_stream import (
    Cancelled,
    CheckpointError,
    DataError,
    OptionError,
    Options,
    OutputError,
    ResumeError,
    extrapolate,
    plan,
    plan_all,
    update,
)
from lox_stream.adapters import _scaling
from lox_stream.api import execute_all
from lox_stream.carrying import _times
from lox_stream.cli import commands
from lox_stream.kinds import stack_of
from lox_stream.options import Rule
from lox_stream.output_rules import JOURNAL
from lox_stream.recomputing import compare_all
from lox_stream.sampling import choose_sample
from lox_stream.synthetic import llama_shapes, pair_of, write_pair
from lox_stream.writer import Output

GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 40}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "vocab_size": 40}
WEIGHTS = "adapter_model.safetensors"
SHAPES: dict[str, tuple[dict[str, object], dict[str, tuple[int, ...]]]] = {
    "llama, untied": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False},
        llama_shapes(32, 48, 1, 40, 16) | {"lm_head.weight": (40, 32)},
    ),
    "llama, tied": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
        llama_shapes(32, 48, 1, 40, 16),
    ),
    "llama, tied and both stored": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
        llama_shapes(32, 48, 1, 40, 16) | {"lm_head.weight": (40, 32)},
    ),
    "turned": (
        GPT2,
        {
            "transformer.wte.weight": (40, 24),
            "transformer.h.0.attn.c_attn.weight": (24, 72),
            "transformer.h.0.attn.c_proj.weight": (24, 24),
            "transformer.h.0.attn.c_proj.bias": (24,),
        },
    ),
    "experts": (
        MIXTRAL,
        {
            "model.embed_tokens.weight": (40, 24),
            **{f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight": (30, 24) for i in range(4)},
            "model.layers.0.shared_expert_gate.weight": (1, 24),
            "lm_head.weight": (40, 24),
        },
    ),
    **{
        f"stacks of {model_type}": (
            {"architectures": ["SomeForCausalLM"], "model_type": model_type, "vocab_size": 40},
            {
                "model.layers.0.self_attn.q_proj.weight": (30, 24),
                **{f"model.layers.{i}.mlp.{name}": shape for i in (0, 1) for name, shape in stacks.items()},
                "model.layers.0.mlp.shared_expert.gate_proj.weight": (20, 24),
            },
        )
        for model_type, stacks in {
            "gpt_oss": {"experts.gate_up_proj": (4, 24, 40), "experts.down_proj": (4, 20, 24)},
            "qwen3_moe": {"experts.gate_up_proj": (4, 40, 24), "experts.down_proj": (4, 24, 20)},
            "aria_text": {"experts.fc1.weight": (3, 24, 40), "experts.fc2.weight": (3, 20, 24)},
            "square": {"experts.gate_up_proj": (2, 24, 24), "one.weight": (3, 36, 36)},
        }.items()
    },
    "a large one": ({"model_type": "new"}, {"proj.weight": (900, 700), "down.weight": (300, 1100)}),
    "convolutions": (
        {"model_type": "new"},
        {"net.conv1.weight": (20, 6, 3), "net.patch.weight": (20, 3, 4, 4), "net.proj.weight": (20, 30)},
    ),
}


def make(root: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """(base, aligned) of a kind of model; a tied head that is stored has the bytes of its embedding."""
    config, shapes = SHAPES[kind]
    generator = torch.Generator().manual_seed(0)
    sides: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    for name, shape in shapes.items():
        count, m, n = stack_of(name, shape, config) if len(shape) > 1 else (1, *shape, 1)
        pairs = [pair_of(m, n, generator, dtype=dtype) for _ in range(count)]
        for side, matrices in zip(sides, zip(*pairs, strict=True), strict=True):
            side[name] = torch.stack(matrices).view(shape)
    for side in sides if kind == "llama, tied and both stored" else ():
        side["lm_head.weight"] = side["model.embed_tokens.weight"].clone()
    base, aligned = (write(root / name, side, **config) for name, side in zip(("base", "aligned"), sides, strict=True))
    return base, aligned


def weights(folder: Path) -> dict[str, bytes]:
    """All weight files of an output."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def adapter(pair: tuple[Path, Path], out: Path, **options: object) -> Path:
    return extrapolate(*pair, out, options=Options(**{"form": "peft", **options})).out


def merged(aligned: Path, folder: Path, out: Path, **options: object) -> Path:
    return extrapolate(aligned, folder, out, options=Options(**{"alpha": 0.0, **options})).out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_merged_adapter_is_what_run_writes(kind, dtype, tmp_path):
    pair = make(tmp_path, kind, dtype)
    extrapolate(*pair, tmp_path / "out")
    folder = adapter(pair, tmp_path / "adapter")
    made = plan(*pair, options=Options(form="peft"))
    assert not made.left_out
    assert weights(merged(pair[1], folder, tmp_path / "merged")) == weights(tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 1},
        {"rank": 30, "alpha": 0.3},
        {"rank": 1000, "alpha": -0.7},
        {"svd": "exact"},
        {"skip": ("*q_proj*",), "alpha": 0.19},
        {"recipe": (Rule("*mlp*", rank=9), Rule("*embed*", alpha=0.05), Rule("*v_proj*", skip=True))},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_whatever_was_asked_for_it_is(form, options, tmp_path):
    """Any rank, any factor, one rank for all modules; for vLLM the factors hold alpha."""
    pair = make(tmp_path, "llama, untied")
    out = load_file(extrapolate(*pair, tmp_path / "out", options=Options(**options)).out / "model.safetensors")
    folder = adapter(pair, tmp_path / "adapter", **{**options, "form": form})
    config = json.loads((folder / "adapter_config.json").read_text())
    shapes = {tensor.shape[0] for name, tensor in load_file(folder / WEIGHTS).items() if "_A" in name}
    assert shapes == {config["r"]}
    left = {one.name for one in plan(*pair, options=Options(**{**options, "form": form})).left_out}
    assert left == ({"model.embed_tokens.weight", "lm_head.weight"} if form == "vllm" else set())
    assert (config["lora_alpha"] == config["r"]) == (form == "vllm")
    aligned = load_file(pair[1] / "model.safetensors")
    for name, weight in load_file(merged(pair[1], folder, tmp_path / "merged") / "model.safetensors").items():
        assert torch.equal(weight, aligned[name] if name in left else out[name]), name


def test_the_words_of_stochastic_rounding_are_those_of_run(tmp_path):
    pair = make(tmp_path, "llama, tied")
    how = {"rounding": "stochastic", "seed": 5}
    extrapolate(*pair, tmp_path / "out", options=Options(**how))
    folder = adapter(pair, tmp_path / "adapter")
    assert weights(merged(pair[1], folder, tmp_path / "merged", **how)) == weights(tmp_path / "out")


@given(st.integers(1, 10**6), st.integers(0, 6), st.integers(1, 256))
def test_any_decimal_alpha_is_read_again_as_it_was(digits, places, rank):
    alpha = float(f"{digits}e-{places}")
    assert _scaling(_times(alpha, rank), rank, {}) == alpha


def test_factors_in_bfloat16_are_those_of_float32_rounded(tmp_path):
    pair = make(tmp_path, "a large one")
    exact, rounded = (
        load_file(adapter(pair, tmp_path / dtype, factor_dtype=dtype) / WEIGHTS) for dtype in ("float32", "bfloat16")
    )
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(exact[name].bfloat16(), tensor) for name, tensor in rounded.items())
    for name in exact:
        if "lora_B" in name:  # balanced: both factors have the square roots of the singular values
            other = exact[name.replace("lora_B", "lora_A")]
            assert torch.allclose(exact[name].norm(dim=0), other.norm(dim=1), rtol=1e-3)


def test_one_solve_serves_many_factors_and_the_adapter(tmp_path, monkeypatch):
    pair = make(tmp_path, "llama, tied")
    extrapolate(*pair, tmp_path / "alone")
    adapter(pair, tmp_path / "adapter alone")
    begun, real = [], update._begin
    monkeypatch.setattr(update, "_begin", lambda *args: begun.append(1) or real(*args))
    alphas = (0.0, -0.5, 0.5, 1.25)
    plans = [plan(*pair, tmp_path / f"out-{alpha}", options=Options(alpha=alpha, solved_for=1.25)) for alpha in alphas]
    plans.append(plan(*pair, tmp_path / "adapter", options=Options(form="peft", solved_for=1.25)))
    summaries = execute_all(plans)
    assert len(begun) == 8, "each matrix once"
    assert weights(tmp_path / "out-1.25") == weights(tmp_path / "alone")
    assert weights(tmp_path / "adapter") == weights(tmp_path / "adapter alone")
    assert weights(tmp_path / "out-0.0") == weights(pair[1])
    for alpha in (-0.5, 0.5):
        other = merged(pair[1], tmp_path / "adapter", tmp_path / f"merged{alpha}", scaling=alpha)
        assert weights(other) == weights(tmp_path / f"out-{alpha}")
    norms = [summary.totals.retention for summary in summaries]
    assert norms[0] is None
    assert norms[4] is None, "an adapter rounds no weight"
    assert all(norms[1:4])


def test_fp8_and_parts_of_fused_projections_are_right_in_a_sweep_too(tmp_path):
    """They are put together, or quantised, for each output by itself."""
    generator = torch.Generator().manual_seed(3)
    config = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    sides = ({}, {})
    w0, w1 = pair_of(64, 32, generator)
    for side, weight in zip(sides, (w0, w1), strict=True):
        side["model.layers.0.self_attn.qkv_proj.weight"] = weight
        scale = weight.float().abs().max() / 448
        side["model.layers.0.mlp.down_proj.weight"] = (weight.float() / scale).to(torch.float8_e4m3fn)
        side["model.layers.0.mlp.down_proj.weight_scale_inv"] = scale.reshape(1, 1)
    pair = tuple(write(tmp_path / name, side, **config) for name, side in zip(("base", "aligned"), sides, strict=True))
    options = [Options(alpha=alpha, solved_for=2.0, split_fused=True) for alpha in (0.5, 2.0)]
    execute_all([plan(*pair, tmp_path / f"out{one.alpha}", options=one) for one in options])
    for one in options:
        alone = extrapolate(*pair, tmp_path / f"alone{one.alpha}", options=one).out
        assert weights(tmp_path / f"out{one.alpha}") == weights(alone)


def test_rows_that_base_lacks_have_no_update(tmp_path):
    base, aligned = make(tmp_path, "llama, untied")
    grown = load_file(aligned / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown[name] = torch.cat([grown[name], torch.ones(3, 32, dtype=torch.bfloat16)])
    save_file(grown, aligned / "model.safetensors", metadata={"format": "pt"})
    how = {"on_shape_mismatch": "overlap"}
    extrapolate(base, aligned, tmp_path / "out", options=Options(**how))
    folder = adapter((base, aligned), tmp_path / "adapter", **how)
    assert load_file(folder / WEIGHTS)["base_model.model.lm_head.lora_B.weight"].shape == (43, 6)
    assert weights(merged(aligned, folder, tmp_path / "merged")) == weights(tmp_path / "out")


def test_what_has_no_update_has_factors_of_zeros(tmp_path):
    base, aligned = make(tmp_path, "llama, untied")
    same = load_file(base / "model.safetensors")
    half = load_file(aligned / "model.safetensors")
    half["lm_head.weight"] = same["lm_head.weight"]
    half["model.embed_tokens.weight"][3, 4] = float("nan")
    save_file(half, aligned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"embed_tokens.*has nan.*Carry such tensors as zeros with --on-nonfinite copy"):
        adapter((base, aligned), tmp_path / "refused")
    summary = extrapolate(base, aligned, tmp_path / "adapter", options=Options(form="peft", on_nonfinite="copy"))
    factors = load_file(tmp_path / "adapter" / WEIGHTS)
    for module in ("lm_head.lora_B.weight", "model.embed_tokens.lora_embedding_B"):
        assert not factors[f"base_model.model.{module}"].any()
    assert summary.totals.identical == 1
    assert any("embed_tokens.weight: carried as zeros and not extrapolated" in warning for warning in summary.warnings)


STACKED = {
    "model.layers.0.mlp.experts.gate_up_proj": (4, 24, 40),
    "model.layers.0.mlp.gate.weight": (4, 24),
    "model.layers.0.self_attn.q_proj.weight": (30, 24),
    "model.embed_positions.weight": (50, 24),
    "model.layers.0.bias_table": (30, 24),
    "model.layers.0.conv.weight": (20, 6, 3),
    "lm_head.weight": (40, 24),
}


@pytest.mark.parametrize(
    ("form", "carried"), [("peft", {"experts", "q_proj", "conv", "lm_head"}), ("vllm", {"q_proj"})]
)
def test_what_it_cannot_carry_is_listed_with_its_reason(form, carried, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "stacked", (MIXTRAL, STACKED))
    pair = make(tmp_path, "stacked")
    summary = extrapolate(*pair, tmp_path / "adapter", options=Options(form=form))
    names = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == carried
    assert all(one.reason for one in summary.left_out)
    assert len(summary.left_out) == len(STACKED) - len(carried)
    assert any("vLLM has in another order" in one.reason for one in summary.left_out) == (form == "vllm")
    said = json.loads((tmp_path / "adapter" / "lox_stream.json").read_text())
    assert [one["name"] for one in said["left_out"]] == [one.name for one in summary.left_out]


STACK = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("shapes", "config", "said"),
    [
        ({"transformer.blocks.0.ffn.experts.mlp.w1": (40, 24)}, {"ffn_config": {"moe_num_experts": 4}}, "one matrix"),
        ({f"{STACK}.in": (4, 30, 24), f"{STACK}.out": (4, 24, 30)}, {}, "(in, out), whose order in it is not known"),
        ({"experts_in": (4, 30, 24)}, {}, "the model's own"),
        ({f"{STACK}.down_proj": (4, 24, 24)}, {"model_type": "qwen3_vl_moe"}, "that the model may have turned"),
    ],
    ids=str,
)
def test_stacks_that_peft_cannot_carry_are_left_out_with_the_true_reason(shapes, config, said, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "odd", (config, shapes | {"q_proj.weight": (30, 24)}))
    made = plan(*make(tmp_path, "odd"), options=Options(form="peft"))
    assert {one.name for one in made.left_out} == shapes.keys()
    assert all(said in one.reason for one in made.left_out)


def test_names_and_shapes_of_stacks_are_those_that_peft_saves(tmp_path):
    """The last parameter of a module is the outermost; A one under the other, B in turns."""
    pair = make(tmp_path, "stacks of qwen3_moe")
    assert any("4 of the weights are stacks" in one for one in plan(*pair, options=Options(form="peft")).warnings)
    folder = adapter(pair, tmp_path / "adapter", rank=3, skip=("*layers.1*.gate_up_proj",))
    shapes = {
        name.removeprefix("base_model.model.model."): tuple(w.shape) for name, w in load_file(folder / WEIGHTS).items()
    }
    assert shapes == {
        "layers.0.mlp.experts.base_layer.lora_A.weight": (12, 24),
        "layers.0.mlp.experts.base_layer.lora_B.weight": (40, 12),
        "layers.0.mlp.experts.lora_A.weight": (12, 20),
        "layers.0.mlp.experts.lora_B.weight": (24, 12),
        "layers.1.mlp.experts.lora_A.weight": (12, 20),
        "layers.1.mlp.experts.lora_B.weight": (24, 12),
        "layers.0.self_attn.q_proj.lora_A.weight": (3, 24),
        "layers.0.self_attn.q_proj.lora_B.weight": (30, 3),
        "layers.0.mlp.shared_expert.gate_proj.lora_A.weight": (3, 24),
        "layers.0.mlp.shared_expert.gate_proj.lora_B.weight": (20, 3),
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    assert config["target_parameters"] == [
        "experts.down_proj",
        "gate_proj.weight",  # as a module PEFT would take it for the experts'
        "model.layers.0.mlp.experts.gate_up_proj",
    ]
    turned = load_file(adapter(make(tmp_path / "2", "stacks of gpt_oss"), tmp_path / "turned", rank=3) / WEIGHTS)
    at = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_"
    assert {side: tuple(turned[f"{at}{side}.weight"].shape) for side in "AB"} == {"A": (12, 24), "B": (40, 12)}


@pytest.mark.parametrize("kind", ["stacks of gpt_oss", "stacks of qwen3_moe"])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 1},
        {"rank": 30, "alpha": -0.3},
        {"svd": "exact", "alpha": 0.19},
        {"rounding": "stochastic", "seed": 3},
        {"recipe": (Rule("*down_proj*", rank=9, alpha=0.05), Rule("*gate_up*", skip=True))},
    ],
    ids=str,
)
def test_whatever_was_asked_for_of_stacks_it_is(kind, options, tmp_path):
    pair = make(tmp_path, kind)
    extrapolate(*pair, tmp_path / "out", options=Options(**options))
    kept = {name: options[name] for name in ("rounding", "seed") if name in options}
    folder = adapter(pair, tmp_path / "adapter", **options)
    assert weights(merged(pair[1], folder, tmp_path / "merged", **kept)) == weights(tmp_path / "out")


def test_alphas_of_stacks_from_one_solve_are_those_of_their_adapter(tmp_path):
    pair = make(tmp_path, "stacks of gpt_oss")
    plans = [plan(*pair, tmp_path / f"{alpha}", options=Options(alpha=alpha, solved_for=1.25)) for alpha in (0.5, 1.25)]
    execute_all([*plans, plan(*pair, tmp_path / "adapter", options=Options(form="peft", solved_for=1.25))])
    assert weights(tmp_path / "adapter") == weights(adapter(pair, tmp_path / "alone"))
    for alpha in (0.5, 1.25):
        again = merged(pair[1], tmp_path / "adapter", tmp_path / f"merged {alpha}", scaling=alpha)
        assert weights(again) == weights(tmp_path / f"{alpha}")


def test_an_expert_without_an_update_has_factors_of_zeros(tmp_path):
    """One that is as in base by itself; all of a stack in which one holds NaN."""
    base, aligned = make(tmp_path, "stacks of qwen3_moe")
    same, half = (load_file(side / "model.safetensors") for side in (base, aligned))
    half[f"{STACK}.gate_up_proj"][2] = same[f"{STACK}.gate_up_proj"][2]
    half[f"{STACK}.down_proj"][3, 4, 5] = float("nan")
    save_file(half, aligned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"experts\.down_proj.*Carry such tensors as zeros"):
        adapter((base, aligned), tmp_path / "refused")
    folder = adapter((base, aligned), tmp_path / "adapter", on_nonfinite="copy", rank=2)
    factors = load_file(folder / WEIGHTS)
    b = factors[f"base_model.model.{STACK}.base_layer.lora_B.weight"].view(40, 2, 4)
    assert [bool(b[:, :, number].any()) for number in range(4)] == [True, True, False, True]
    assert not factors[f"base_model.model.{STACK}.lora_B.weight"].any()
    extrapolate(base, aligned, tmp_path / "out", options=Options(2, on_nonfinite="copy"))
    assert weights(merged(aligned, folder, tmp_path / "merged")) == weights(tmp_path / "out")
    assert all(one.ok for one in compare_all(choose_sample(folder, base, aligned, count=30)))


@pytest.mark.parametrize("kind", ["stacks of gpt_oss", "stacks of qwen3_moe"])
def test_each_expert_is_verified_by_itself_and_a_stack_repaired_whole(kind, tmp_path):
    pair = make(tmp_path, kind)
    folder = adapter(pair, tmp_path / "adapter", rank=2, alpha=0.8)
    right = weights(folder)
    checked = list(compare_all(choose_sample(folder, *pair, count=40)))
    assert len(checked) == 2 + 4 * 4
    assert all(one.ok for one in checked)
    factors = load_file(folder / WEIGHTS)
    name = f"base_model.model.{STACK}.lora_B.weight"
    factors[name].view(24, 2, 4)[:, :, 1] *= 1.1
    save_file(factors, folder / WEIGHTS, metadata={"format": "pt"})
    wrong = [one.name for one in compare_all(choose_sample(folder, *pair, count=40)) if not one.ok]
    assert wrong == [f"{STACK}.down_proj[1]"]
    data = bytearray(right[WEIGHTS])
    data[-9] ^= 4
    (folder / WEIGHTS).write_bytes(data)
    summary = extrapolate(*pair, folder, options=Options(2, 0.8, form="peft"), resume=True, repair=True)
    assert len(summary.repaired or ()) == 1
    assert weights(folder) == right
    out = merged(pair[1], folder, tmp_path / "merged")
    merging = list(compare_all(choose_sample(out, pair[1], folder, count=40)))
    assert sum(one.kind == "merged" for one in merging) == 2 + 4 * 4
    assert all(one.ok for one in merging)


def test_stacks_of_a_run_that_was_stopped_are_gone_on_with_to_the_same_bytes(tmp_path):
    pair = make(tmp_path, "stacks of qwen3_moe")
    right = weights(adapter(pair, tmp_path / "right"))
    for stop_after in (1, 2, 3):
        folder = tmp_path / f"stopped after {stop_after}"
        interrupted(pair, {str(folder): Options(form="peft", threads=1)}, stop_after)
        extrapolate(*pair, folder, options=Options(form="peft"), resume=True)
        assert weights(folder) == right
        out = tmp_path / f"out {stop_after}"
        interrupted((pair[1], folder), {str(out): Options(alpha=0.0, threads=1)}, stop_after)
        extrapolate(pair[1], folder, out, options=Options(alpha=0.0), resume=True)
        assert weights(out) == weights(extrapolate(*pair, tmp_path / "whole", overwrite=True).out)


def test_names_of_modules_are_short_where_that_is_unambiguous(tmp_path, monkeypatch):
    """A last part names all modules that end so; one that holds others, or is left alone, is spelled out."""
    shapes = {f"layers.{i}.{name}.weight": (30, 24) for i in (0, 1) for name in ("up", "conv.conv", "mlp.0", "down")}
    monkeypatch.setitem(SHAPES, "named", ({"model_type": "new"}, shapes))
    pair = make(tmp_path, "named")
    folder = adapter(pair, tmp_path / "adapter", skip=("layers.1.down.weight",))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["up", "layers.0.down", *(f"layers.{i}.{name}" for i in (0, 1) for name in ("conv.conv", "mlp.0"))]
    )


def interrupted(pair: tuple[Path, Path], outs: dict[str, Options], stop_after: int, **how: bool) -> None:
    """Cancelled when so many tensors are done."""
    cancel = threading.Event()

    def progress(reached):
        if reached.done_tensors >= stop_after:
            cancel.set()

    with pytest.raises(Cancelled):
        execute_all(
            [plan(*pair, out, options=options, **how) for out, options in outs.items()],
            progress=progress,
            cancel=cancel,
            **how,
        )


def test_a_run_of_several_outputs_that_was_stopped_goes_on_to_the_same_bytes(tmp_path):
    pair = write_pair(tmp_path / "pair", llama_shapes(64, 96, 4, 80, 32))
    ways = {"a": Options(alpha=0.5, solved_for=1.25), "b": Options(solved_for=1.25), "f": Options(form="peft")}
    ways["f"] = Options(form="peft", solved_for=1.25)
    whole = {name: tmp_path / f"whole {name}" for name in ways}
    execute_all([plan(*pair, whole[name], options=options) for name, options in ways.items()])
    parts = {str(tmp_path / name): options for name, options in ways.items()}
    interrupted(pair, parts, 12)
    execute_all([plan(*pair, out, options=options, resume=True) for out, options in parts.items()], resume=True)
    for name in ways:
        assert weights(tmp_path / name) == weights(whole[name])


def test_a_crash_between_the_publishing_of_two_outputs_is_gone_on_with(tmp_path, monkeypatch):
    """The first one is finished and left as it is; the other is made from its journal."""
    pair = make(tmp_path, "llama, tied")
    ways = {name: Options(alpha=alpha, solved_for=1.25) for name, alpha in (("a", 0.5), ("b", 1.25))}
    whole = {name: extrapolate(*pair, tmp_path / f"whole {name}", options=ways[name]).out for name in ways}
    real = Output.publish

    def crash(self, documents):
        if self.folder.name == "b":
            raise OutputError("a crash")
        real(self, documents)

    def run(**how):
        return execute_all(plan_all(*pair, [(tmp_path / name, ways[name]) for name in ways], **how), **how)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "publish", crash)
        with pytest.raises(OutputError, match="a crash"):
            run()
    assert (tmp_path / "a" / "lox_stream.json").exists()
    before = (tmp_path / "a" / "lox_stream.json").read_bytes()
    left, made = run(resume=True)
    assert "was finished before, and is left as it is" in left.warnings[-1]
    assert left.totals.retention == pytest.approx(0.5, abs=0.5)
    assert made.written_bytes == 0, "all of its tensors were journaled"
    for name in ways:
        assert weights(tmp_path / name) == weights(whole[name])
    assert (tmp_path / "a" / "lox_stream.json").read_bytes() == before
    with pytest.raises(OutputError, match="There is nothing to resume"):
        run(resume=True)
    (tmp_path / "b" / "lox_stream.json").unlink()
    (tmp_path / "b" / "model.safetensors").unlink()
    other = plan_all(*pair, [(tmp_path / name, Options(alpha=9.0)) for name in ways], resume=True)
    with pytest.raises(ResumeError, match="this is another run"):
        execute_all(other, resume=True)


def test_half_a_pair_of_factors_is_made_again(tmp_path):
    """A journal that ends after B and before A: the tensor is not finished."""
    pair = make(tmp_path, "llama, untied")
    right = weights(adapter(pair, tmp_path / "right"))
    interrupted(pair, {str(tmp_path / "adapter"): Options(form="peft", threads=1)}, 3)
    journal = tmp_path / "adapter" / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    factors = [number for number, line in enumerate(lines) if "lora_" in line]
    for end in (factors[0] + 1, factors[1] + 1, len(lines)):
        folder = tmp_path / f"cut at {end}"
        shutil.copytree(tmp_path / "adapter", folder)
        (folder / JOURNAL).write_text("".join(lines[:end]))
        extrapolate(*pair, folder, options=Options(form="peft"), resume=True)
        assert weights(folder) == right


def test_an_adapter_is_checked_byte_by_byte_and_against_float64_and_repaired(tmp_path):
    pair = make(tmp_path, "llama, tied")
    folder = adapter(pair, tmp_path / "adapter")
    right = weights(folder)
    words = ["verify", str(folder), "--base", str(pair[0]), "--aligned", str(pair[1]), "--sample", "20"]
    checked = CliRunner().invoke(commands, words)
    assert checked.exit_code == 0, checked.output
    assert "factors" in checked.output
    data = bytearray(right[WEIGHTS])
    data[-100] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    broken = CliRunner().invoke(commands, ["verify", str(folder)])
    assert broken.exit_code == 1
    assert "lora" in broken.stderr
    summary = extrapolate(*pair, folder, options=Options(form="peft"), resume=True, repair=True)
    assert len(summary.repaired or ()) == 1
    assert weights(folder) == right


@pytest.mark.parametrize("form", ["peft", "vllm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_factors_of_another_matrix_fail_against_float64(form, dtype, tmp_path):
    pair = make(tmp_path, "a large one")
    folder = adapter(pair, tmp_path / "adapter", form=form, factor_dtype=dtype, alpha=0.8)
    sample = choose_sample(folder, *pair, count=20)
    assert [one.kind for one in compare_all(sample)] == ["factors"] * 2
    assert all(one.ok for one in compare_all(sample))
    factors = load_file(folder / WEIGHTS)
    name = "base_model.model.proj.lora_B.weight"
    factors[name][:, 1] *= 1.1
    save_file(factors, folder / WEIGHTS, metadata={"format": "pt"})
    assert sorted((one.name, one.ok) for one in compare_all(choose_sample(folder, *pair, count=20))) == [
        ("down.weight", True),
        ("proj.weight", False),
    ]


def test_an_adapter_takes_the_place_of_weights_and_the_other_way_about(tmp_path):
    pair = make(tmp_path, "llama, tied")
    out = extrapolate(*pair, tmp_path / "out").out
    extrapolate(*pair, out, options=Options(form="peft"), overwrite=True)
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", WEIGHTS, "README.md", "lox_stream.json"}
    extrapolate(*pair, out, overwrite=True)
    assert not (out / WEIGHTS).exists()
    assert not (out / "adapter_config.json").exists()


def test_the_config_that_makes_it_loadable_is_the_last_to_come(tmp_path, monkeypatch):
    """As an index of weights: a crash before it leaves nothing that PEFT would load."""
    pair = make(tmp_path, "llama, tied")
    real = Path.replace

    def crash(self, target):
        if Path(target).name == "adapter_config.json":
            raise OSError(5, "a crash")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OutputError):
        adapter(pair, tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).exists()
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()


def lox(*words: object) -> object:
    return CliRunner().invoke(commands, [str(word) for word in words], prog_name="lox-stream")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["adapter", "--rank", "0"], 2, "is 0 (full rank); expected 1 or more"),
        (["adapter", "--alpha", "1,2"], 2, "names several factors, expected one"),
        (["adapter", "--dtype", "float16"], 2, "'--dtype'"),
        (["adapter", "--only", "*norm*"], 2, "no tensor that an adapter can carry is extrapolated"),
        (["run", "--alpha", "1,2"], 2, "expected a place for them in it"),
        (["run", "--alpha", "1,1.0", "--out", "o-{alpha}"], 2, "names 1 twice"),
        (["run", "--alpha", ""], 2, "expected a finite number"),
        (["run", "--save-factors", "OUT"], 2, "is asked for twice"),
        (["run", "--save-factors", "OUT/in"], 2, "another output"),
        (["adapter", "--alpha", "0"], 2, "an adapter that adds nothing is none"),
        (["adapter", "--only", "*nope*"], 2, "matches no tensor"),
        (["run", "--split-fused", "--save-factors", "factors"], 0, ""),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_anything_is_written(words, code, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = make(tmp_path, "llama, tied")
    words = [word.replace("OUT", str(tmp_path / "out")) for word in words]
    more = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    ended = lox(words[0], "--base", pair[0], "--aligned", pair[1], *more, *words[1:])
    assert ended.exit_code == code, ended.output
    assert said in ended.stderr
    if code:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "base"]


def test_adapters_of_what_is_none_are_refused(tmp_path):
    base, aligned = make(tmp_path, "llama, tied")
    folder = adapter((base, aligned), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"aligned is an adapter itself.*Merge it first"):
        adapter((aligned, folder), tmp_path / "other")
    ended = lox("apply", "--adapter", base, "--aligned", aligned, "--out", tmp_path / "out")
    assert ended.exit_code == 1
    assert "holds no LoRA adapter" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_the_commands_say_what_they_did(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = make(tmp_path, "llama, tied")
    told = lox("adapter", "--base", pair[0], "--aligned", pair[1], "--out", "adapter")
    assert told.exit_code == 0, told.output
    assert "9 modules, rank 6, F32" in told.stdout
    assert "merge_and_unload() would add the change twice" in told.stderr
    told = lox("apply", "--adapter", "adapter", "--aligned", pair[1], "--out", "merged", "--alpha", "0.5")
    assert re.search(r"merged +8 of 11 tensors, by an adapter", told.stdout)
    told = lox("run", "--base", pair[0], "--aligned", pair[1], "--out", "o-{alpha}", "--alpha", "0.5,2", "--json")
    documents = json.loads(told.stdout)["outputs"]
    assert [Path(document["out"]).name for document in documents] == ["o-0.5", "o-2"]
    assert weights(tmp_path / "o-0.5").keys() == {"model.safetensors"}
    dry = lox("adapter", "--base", pair[0], "--aligned", pair[1], "--out", "dry", "--dry-run", "--json")
    assert json.loads(dry.stdout)["steps"][0]["modules"]
    assert not Path("dry").exists()


def test_an_adapter_in_another_model_is_warned_of(tmp_path):
    base, aligned = make(tmp_path, "llama, untied")
    folder = adapter((base, aligned), tmp_path / "adapter")
    wrong = extrapolate(base, folder, tmp_path / "wrong", options=Options(alpha=0.0))
    assert any("was made for another model than" in warning for warning in wrong.warnings)
    right = extrapolate(aligned, folder, tmp_path / "right", options=Options(alpha=0.0))
    assert not any("another model" in warning for warning in right.warnings)


def test_a_set_of_outputs_is_mended_whole_and_one_by_its_manifest(tmp_path, monkeypatch):
    """A folder that is gone is made anew, a damaged one repaired, a finished one left."""
    monkeypatch.chdir(tmp_path)
    pair = make(tmp_path, "llama, tied")
    words = ["run", "--base", pair[0], "--aligned", pair[1], "--alpha", "0.5,1,1.25", "--out", "o-{alpha}", "--quiet"]
    assert lox(*words).exit_code == 0
    right = {name: weights(tmp_path / name) for name in ("o-0.5", "o-1", "o-1.25")}

    def damage(name):
        data = bytearray(right[name]["model.safetensors"])
        data[-9] ^= 4
        (tmp_path / name / "model.safetensors").write_bytes(data)

    shutil.rmtree(tmp_path / "o-1")
    resumed = lox(*words, "--resume")
    assert resumed.exit_code == 0, resumed.output
    shutil.rmtree(tmp_path / "o-1")
    damage("o-0.5")
    mended = lox(*words, "--resume", "--repair")
    assert mended.exit_code == 0, mended.output
    assert {name: weights(tmp_path / name) for name in right} == right
    damage("o-0.5")
    one = [*words[:5], "--out", "o-0.5", "--alpha", "0.5", "--resume", "--repair"]
    refused = lox(*one)
    assert "the largest of several --alpha (0.0: one alone) is 0.0, the run began with 1.25" in refused.stderr
    told = lox(*one, "--recipe", "o-0.5/lox_stream.json")
    assert told.exit_code == 0, told.output
    assert weights(tmp_path / "o-0.5") == right["o-0.5"]


def test_a_recipe_of_an_adapter_is_told_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = make(tmp_path, "llama, untied")
    words = ["adapter", "--base", pair[0], "--aligned", pair[1], "--quiet"]
    assert lox(*words, "--out", "a", "--target", "vllm", "--dtype", "bfloat16", "--rank", "2").exit_code == 0
    assert lox(*words, "--out", "b", "--recipe", "a/lox_stream.json").exit_code == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    ran = lox("run", *words[1:], "--out", "c", "--recipe", "a/lox_stream.json")
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "c" / "model.safetensors").exists(), "run writes weights, with the rank that was told"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"on_missing": "copy"}, "a matrix that base lacks"),
        ({"on_shape_mismatch": "copy"}, "a matrix of another shape in base"),
    ],
)
def test_matrices_that_base_has_not_are_left_out_by_name(change, said, tmp_path):
    base, aligned = make(tmp_path, "llama, untied")
    kept = load_file(base / "model.safetensors")
    if "on_missing" in change:
        del kept["lm_head.weight"]
    else:
        kept["lm_head.weight"] = kept["lm_head.weight"][:, :30].contiguous()
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    made = plan(base, aligned, options=Options(form="peft", **change))
    assert [(one.name, one.reason) for one in made.left_out] == [("lm_head.weight", said)]


def test_apply_speaks_of_what_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, aligned = make(tmp_path, "llama, untied")
    folder = adapter((base, aligned), tmp_path / "adapter")
    words = ["apply", "--adapter", folder, "--aligned", aligned, "--out"]
    nothing = lox(*words, "zero", "--alpha", "0")
    assert nothing.exit_code == 0
    assert "the adapter changes nothing" in nothing.stderr
    assert "wrong model" not in nothing.stderr
    both = lox("apply", "--adapter", folder, "--aligned", folder, "--out", "o")
    assert "aligned: " in both.stderr
    assert "holds an adapter, expected the model that --adapter changes" in both.stderr
    gone = lox("apply", "--adapter", folder, "--aligned", "nowhere", "--out", "o")
    assert gone.stderr.startswith("error: aligned: ")
    onto = lox(*words, folder)
    assert "is the folder of adapter" in onto.stderr
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    dora = lox(*words, "o")
    assert dora.stderr.startswith("error: adapter: ")
    assert "as aligned" not in dora.stderr
    with pytest.raises(OptionError, match="which is for an adapter"):
        plan(base, aligned, options=Options(scaling=2.0))


def test_a_head_that_transformers_renames_is_under_both_names(tmp_path, monkeypatch):
    config = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": 40}
    shapes = {
        "gpt_neox.embed_in.weight": (40, 24),
        "gpt_neox.layers.0.mlp.w.weight": (30, 24),
        "embed_out.weight": (40, 24),
    }
    monkeypatch.setitem(SHAPES, "neox", (config, shapes))
    pair = make(tmp_path, "neox")
    folder = adapter(pair, tmp_path / "adapter")
    factors = load_file(folder / WEIGHTS)
    for side in ("A", "B"):
        one, other = (factors[f"base_model.model.{name}.lora_{side}.weight"] for name in ("embed_out", "lm_head"))
        assert torch.equal(one, other)
    assert "ensure_weight_tying" not in json.loads((folder / "adapter_config.json").read_text())
    extrapolate(*pair, tmp_path / "out")
    assert weights(merged(pair[1], folder, tmp_path / "merged")) == weights(tmp_path / "out")
