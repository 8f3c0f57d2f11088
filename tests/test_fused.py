"""Where the parts of fused projections lie, and that splitting gives what the parts give as tensors of their own."""

from __future__ import annotations

import json
from dataclasses import replace

import exactly
import pytest
import torch
from folders import write
from safetensors.torch import load_file

from lox_stream import Options, extrapolate, plan, stream
from lox_stream.fused import parts_of
from lox_stream.options import Rule
from lox_stream.planning import memory_needed
from lox_stream.reader import grouped
from lox_stream.recomputing import compare_all
from lox_stream.regions import regions_of
from lox_stream.sampling import choose_sample, units_of
from lox_stream.synthetic import pair_of

SPLIT = Options(rank=3, split_fused=True)
D, N = 4, 30  # a head's width, columns
HEADS = {"num_attention_heads": 6}
GROUPED = {**HEADS, "num_key_value_heads": 2}
LINEAR = dict(zip(("linear_num_key_heads", "linear_num_value_heads"), (2, 4), strict=True))
LINEAR |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), D)
FALCON = {"model_type": "falcon", "multi_query": False, "new_decoder_architecture": False, **HEADS}


def per_head(w):
    return [part.reshape(-1, N) for part in w.view(6, 3, D, N).unbind(1)]


def per_group(w):
    groups = w.view(2, 5, D, N)
    return [part.reshape(-1, N) for part in (groups[:, :3], groups[:, 3], groups[:, 4])]


def rows(*sizes):
    return lambda w: w.split(sizes, 0)


CASES = {  # name, shape of a matrix, config, and its parts as the models' own code takes them
    "phi3": ("a.qkv_proj.weight", (40, N), {"model_type": "phi3", **GROUPED}, rows(24, 8, 8)),
    "phi3, inside": (
        *("a.qkv_proj.weight", (40, N), {"model_type": "x", "text_config": {"model_type": "phi3", **GROUPED}}),
        rows(24, 8, 8),
    ),
    "phi3, other width": ("a.qkv_proj.weight", (40, N), {"model_type": "phi3", **GROUPED, "head_dim": 5}, None),
    "codegen": (
        *("a.qkv_proj.weight", (72, N), {"model_type": "codegen"}),
        lambda w: [part.reshape(-1, N) for part in w.view(4, 3, 6, N).unbind(1)],
    ),
    "a stranger": ("a.qkv_proj.weight", (72, N), {"model_type": "stranger", **HEADS}, None),
    "gpt_neox": ("a.query_key_value.weight", (72, N), {"model_type": "gpt_neox", **HEADS}, per_head),
    "bloom": ("a.query_key_value.weight", (72, N), {"model_type": "bloom", "n_head": 6}, per_head),
    "no heads": ("a.query_key_value.weight", (72, N), {"model_type": "bloom"}, None),
    "falcon": ("a.query_key_value.weight", (72, N), FALCON, per_head),
    "falcon 7b": ("a.query_key_value.weight", (32, N), {**FALCON, "multi_query": True}, rows(24, 4, 4)),
    "falcon 40b": (
        *("a.query_key_value.weight", (40, N), {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
        per_group,
    ),
    "chatglm": (
        "a.query_key_value.weight",
        (40, N),
        {"model_type": "chatglm", "multi_query_attention": True, "multi_query_group_num": 2, **HEADS},
        rows(24, 8, 8),
    ),
    "chatglm, ffn": ("a.dense_h_to_4h.weight", (40, N), {"model_type": "chatglm", "ffn_hidden_size": 20}, rows(20, 20)),
    "chatglm-6b, ffn": ("a.dense_h_to_4h.weight", (40, N), {"model_type": "chatglm", "inner_hidden_size": 40}, None),
    "bloom, ffn": ("a.dense_h_to_4h.weight", (40, N), {"model_type": "bloom", "n_head": 6}, None),
    "internlm2": ("a.attention.wqkv.weight", (40, N), {"model_type": "internlm2", **GROUPED}, per_group),
    "dbrx": (
        *("a.Wqkv.weight", (40, N), {"model_type": "dbrx", "n_heads": 6, "attn_config": {"kv_n_heads": 2}}),
        rows(24, 8, 8),
    ),
    "modernbert": ("a.Wqkv.weight", (3 * N, N), {"model_type": "modernbert"}, rows(N, N, N)),
    "baichuan": ("a.W_pack.weight", (3 * N, N), {}, rows(N, N, N)),
    "grouped and unsaid": ("a.Wqkv.weight", (40, N), {}, None),
    "gpt2": ("h.0.attn.c_attn.weight", (N, 36), {"model_type": "gpt2"}, lambda w: w.split(12, 1)),
    "gpt2, across": ("h.0.crossattention.c_attn.weight", (N, 24), {"model_type": "gpt2"}, lambda w: w.split(12, 1)),
    "starcoder": (
        *("h.0.attn.c_attn.weight", (32, N), {"model_type": "gpt_bigcode", "multi_query": True, "n_head": 6}),
        rows(24, 4, 4),
    ),
    "mamba": ("a.mixer.in_proj.weight", (40, N), {"model_type": "mamba"}, rows(20, 20)),
    "mamba2": (
        "a.mixer.in_proj.weight",
        (2 * 2 * N + 2 * 16 + 5, N),
        {"model_type": "mamba2", "expand": 2, "n_groups": 2, "state_size": 8, "num_heads": 5},
        rows(2 * N, 2 * N, 16, 16, 5),
    ),
    "qwen3_next": (
        *("a.in_proj_qkvz.weight", (48, N), {"model_type": "qwen3_next", **LINEAR}),
        lambda w: [part.reshape(-1, N) for part in w.view(2, 24, N).split([D, D, 2 * D, 2 * D], 1)],
    ),
    "qwen3_5": ("a.in_proj_qkv.weight", (32, N), {"model_type": "qwen3_5_text", **LINEAR}, rows(8, 8, 16)),
    "torch": ("attn.in_proj_weight", (36, N), {}, rows(12, 12, 12)),
    "pictures": ("visual.blocks.0.attn.qkv.weight", (3 * N, N), {}, rows(N, N, N)),
    "ffn": ("a.mlp.gate_up_proj.weight", (40, N), {}, rows(20, 20)),
    "odd": ("a.mlp.gate_up_proj.weight", (41, N), {}, None),
    "experts": ("a.experts.gate_up_proj", (40, N), {"model_type": "qwen3_moe", "hidden_size": N}, rows(20, 20)),
    "experts, lying": ("a.experts.gate_up_proj", (N, 40), {"model_type": "qwen3_moe", "hidden_size": N}, None),
    "llama4": (
        *("a.experts.gate_up_proj", (N, 40), {"model_type": "llama4_text", "hidden_size": N}),
        lambda w: w.split(20, 1),
    ),
    "qwen3_vl_moe": (
        *("a.experts.gate_up_proj", (N, 40), {"model_type": "qwen3_vl_moe_text", "hidden_size": N}),
        lambda w: w.split(20, 1),
    ),
    "qwen3_vl_moe, saved": (
        *("a.experts.gate_up_proj", (40, N), {"model_type": "qwen3_vl_moe_text", "hidden_size": N}),
        rows(20, 20),
    ),
    "qwen3_vl_moe, square": (
        "a.experts.gate_up_proj",
        (N, N),
        {"model_type": "qwen3_vl_moe_text", "hidden_size": N},
        None,
    ),
    "aria": (
        *("a.experts.fc1.weight", (N, 40), {"model_type": "aria_text", "hidden_size": N}),
        lambda w: w.split(20, 1),
    ),
    "gpt_oss": (
        *("a.experts.gate_up_proj", (N, 40), {"model_type": "gpt_oss", "hidden_size": N}),
        lambda w: [w[:, ::2], w[:, 1::2]],
    ),
    "geglu": ("a.ff.net.0.proj.weight", (8 * N, N), {}, rows(4 * N, 4 * N)),
    "gelu": ("a.ff.net.0.proj.weight", (4 * N, N), {}, None),
    "no fused one": ("a.q_proj.weight", (3 * N, N), {"model_type": "phi3", **GROUPED}, None),
}
SPLITTING = [name for name, case in CASES.items() if case[3] is not None]
WHOLE = [name for name, case in CASES.items() if case[3] is None]


def make(folder, case, dtype=torch.bfloat16, count=0):
    """A pair whose aligned config and tensor are those of a case, (count, m, n) or (m, n), and one that is no part."""
    name, shape, config, _ = CASES[case]
    generator = torch.Generator().manual_seed(1)
    w0, w1 = (
        torch.stack(side)
        for side in zip(*(pair_of(*shape, generator, dtype=dtype) for _ in range(count or 1)), strict=False)
    )
    sides = {"base": w0, "aligned": w1}
    for side, w in sides.items():
        write(folder / side, {name: w if count else w[0], "norm.weight": torch.ones(9)}, **config)
    return folder / "base", folder / "aligned", sides


def exact(case, w1, w0, options=SPLIT):
    """A matrix whose parts were each extrapolated by themselves, in float64."""
    places, right = torch.arange(w1.numel()).view(w1.shape), torch.empty(w1.numel(), dtype=torch.float64)
    cut = CASES[case][3]
    for where, a, b in zip(*map(cut, (places, w1, w0)), strict=True):
        rank = options.rank or min(a.shape)
        right[where.flatten()] = exactly.extrapolated(a, b, rank, options.alpha).flatten()
    return right.view(w1.shape)


@pytest.mark.parametrize("case", CASES)
def test_the_parts_are_where_the_models_take_them_from(case, tmp_path):
    name, shape, config, cut = CASES[case]
    parts = parts_of(name, *shape, config)
    assert bool(parts) == (cut is not None)
    if not parts:
        return
    base, aligned, _ = make(tmp_path, case)
    step = next(step for step in plan(base, aligned, options=SPLIT).steps if step.name == name)
    places = torch.arange(shape[0] * shape[1])
    found = [grouped(places, region).reshape(region.m, region.n) for region in regions_of(step)]
    assert [part.tolist() for part in found] == [part.tolist() for part in cut(places.view(shape))]
    assert torch.equal(torch.cat([part.flatten() for part in found]).sort().values, places)
    assert len({region.label for region in regions_of(step)}) == len(found)
    words = [word for region in regions_of(step) for word in range(region.words, region.words + region.m * region.n)]
    assert words == places.tolist(), "each element has a random word of its own"


@pytest.mark.parametrize("case", SPLITTING)
def test_splitting_gives_what_the_parts_give_by_themselves(case, tmp_path):
    base, aligned, sides = make(tmp_path, case)
    summary = extrapolate(base, aligned, tmp_path / "out", options=SPLIT)
    name = CASES[case][0]
    out = load_file(tmp_path / "out" / "model.safetensors")[name]
    w0, w1 = (sides[side][0] for side in ("base", "aligned"))
    right = exact(case, w1, w0)
    wrong = int((out != right.bfloat16()).sum())
    assert wrong <= 0.0005 * out.numel() + 1
    assert (out != exactly.extrapolated(w1, w0, SPLIT.rank, SPLIT.alpha).bfloat16()).float().mean() > 0.02
    assert summary.totals.extrapolated == 1
    row = json.loads((tmp_path / "out" / "lox_stream.json").read_text())["tensors"][name]
    assert len(row["matrices"]) == len(parts_of(name, *CASES[case][1], CASES[case][2]))
    assert dict(stream(base, aligned, options=SPLIT))[name].equal(out)


@pytest.mark.parametrize("case", ["experts", "llama4", "gpt_oss"])
@pytest.mark.parametrize(
    "options",
    [SPLIT, replace(SPLIT, rank=0), replace(SPLIT, svd="exact"), replace(SPLIT, memory_bytes=1 << 21)],
    ids=["usual", "full rank", "exact", "one at a time"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_expert_of_a_stack_is_split(case, options, dtype, tmp_path):
    base, aligned, sides = make(tmp_path, case, dtype, count=20)
    extrapolate(base, aligned, tmp_path / "out", options=options)
    out = load_file(tmp_path / "out" / "model.safetensors")[CASES[case][0]]
    right = torch.stack([exact(case, *pair, options) for pair in zip(sides["aligned"], sides["base"], strict=True)])
    if dtype == torch.bfloat16:
        assert int((out != right.bfloat16()).sum()) <= 0.0005 * out.numel() + 1
    else:
        assert torch.allclose(out.double(), right, rtol=1e-5, atol=1e-6)
    _, units = units_of(tmp_path / "out", base, aligned)
    assert {unit.name for unit in units} >= {f"{CASES[case][0]}[{i}][{p}]" for i in range(20) for p in ("gate", "up")}


@pytest.mark.parametrize("case", ["phi3", "gpt_neox", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_verify_recomputes_the_parts(case, rounding, tmp_path):
    base, aligned, _ = make(tmp_path, case)
    options = replace(SPLIT, rounding=rounding, seed=4)
    extrapolate(base, aligned, tmp_path / "out", options=options)
    compared = list(compare_all(choose_sample(tmp_path / "out", base, aligned, count=9)))
    assert len(compared) == len(CASES[case][3](torch.empty(CASES[case][1]))) + 1
    assert all(seen.ok and seen.share > 0.995 for seen in compared)


@pytest.mark.parametrize("case", ["phi3", "gpt_neox"])
def test_stochastic_rounding_has_no_bias(case, tmp_path):
    base, aligned, sides = make(tmp_path, case)
    right = exact(case, sides["aligned"][0], sides["base"][0])
    total = torch.zeros_like(right)
    for seed in range(40):
        options = replace(SPLIT, rounding="stochastic", seed=seed)
        total += dict(stream(base, aligned, options=options))[CASES[case][0]].double()
    step = torch.ldexp(torch.ones_like(right), torch.frexp(right)[1] - 8)
    assert float(((total / 40 - right) / step).mean().abs()) < 0.02
    assert float(((total / 40 - right) / step).abs().max()) < 0.5


def test_a_part_that_is_the_same_on_both_sides_is_copied(tmp_path):
    name, _, config, _ = CASES["gpt_oss"]
    generator = torch.Generator().manual_seed(1)
    w0, w1 = pair_of(N, 40, generator, dtype=torch.bfloat16)
    w1[:, 1::2] = w0[:, 1::2]
    base = write(tmp_path / "base", {name: w0[None]}, **config)
    aligned = write(tmp_path / "aligned", {name: w1[None]}, **config)
    extrapolate(base, aligned, tmp_path / "out", options=SPLIT)
    out = load_file(tmp_path / "out" / "model.safetensors")[name][0]
    assert torch.equal(out[:, 1::2], w1[:, 1::2])
    assert not torch.equal(out[:, ::2], w1[:, ::2])


def test_what_is_not_finite_in_one_part_leaves_the_tensor_as_it_is(tmp_path):
    base, aligned, _ = make(tmp_path, "gpt_neox")
    name, _, config, _ = CASES["gpt_neox"]
    w1 = load_file(aligned / "model.safetensors")[name]
    w1[D + 1, 3] = torch.nan  # of the first key
    aligned = write(tmp_path / "broken", {name: w1, "norm.weight": torch.ones(9)}, **config)
    extrapolate(base, aligned, tmp_path / "out", options=replace(SPLIT, on_nonfinite="copy"))
    out = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert torch.equal(out.view(torch.int16), w1.view(torch.int16))


@pytest.mark.parametrize("case", WHOLE)
def test_what_is_not_known_stays_one_matrix(case, tmp_path):
    base, aligned, _ = make(tmp_path, case)
    made = plan(base, aligned, options=SPLIT)
    assert not any(step.parts for step in made.steps)
    assert any("fused projections" in told for told in made.warnings) == (
        case not in ("no fused one", "gelu", "bloom, ffn", "chatglm-6b, ffn")
    )
    same = [dict(stream(base, aligned, options=replace(SPLIT, split_fused=split))) for split in (True, False)]
    assert all(torch.equal(weight, same[1][name]) for name, weight in same[0].items())


def test_a_rule_of_a_recipe_splits_its_tensors_alone(tmp_path):
    base, aligned, _ = make(tmp_path, "phi3")
    parts = {}
    for match in ("a.*", "norm.*"):
        made = plan(base, aligned, options=Options(recipe=(Rule(match, split_fused=True),)))
        parts[match] = [len(step.parts) for step in made.steps]
    assert sorted(parts["a.*"]) == [0, 3]
    assert parts["norm.*"] == [0, 0]


def test_copies_of_scattered_parts_count_as_memory(tmp_path):
    for case, more in (("phi3", 0), ("gpt_neox", (72 * N + 72 * N // 3 * 2) * 2)):
        base, aligned, _ = make(tmp_path / case, case)
        (step,) = (step for step in plan(base, aligned, options=SPLIT).steps if step.parts)
        part = replace(step, parts=(), m=step.parts[0].m)
        alone = replace(SPLIT, memory_bytes=1)
        assert memory_needed(step, alone) == memory_needed(part, alone) + more
