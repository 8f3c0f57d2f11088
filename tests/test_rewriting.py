"""Outputs with other dtypes or files than aligned: the numbers are the same, rounded once, and loaders find them."""

from __future__ import annotations

import json

import pytest
import torch
from exactly import extrapolated
from folders import write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lox_stream import Options, extrapolate, plan, stream
from lox_stream.errors import DataError
from lox_stream.recomputing import compare, rounded_once
from lox_stream.rewriting import balanced
from lox_stream.sampling import units_of
from lox_stream.verifying import verify_checksums

SHAPES = {
    "model.embed_tokens.weight": (70, 24),
    "model.layers.0.attn.q.weight": (24, 24),
    "model.layers.0.mlp.experts.up": (3, 40, 24),
    "model.layers.0.mlp.router.bias": (3,),
    "model.layers.1.attn.qkv_proj.weight": (48, 24),
    "model.norm.weight": (24,),
}
CONFIG = {
    "torch_dtype": "bfloat16",
    "model_type": "phi3",
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 24,
    "text_config": {"dtype": "bfloat16"},
    "limit": [0.0, float("inf")],
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def pair_of(root, dtype, base_dtype=torch.float32, **more):
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
    aligned = {name: (t + 0.05 * torch.randn(t.shape, generator=generator)).to(dtype) for name, t in base.items()}
    aligned |= {"position_ids": torch.arange(7), **more}
    return write(root / "base", {name: t.to(base_dtype) for name, t in base.items()}, **CONFIG), write(
        root / "aligned", aligned, **CONFIG
    )


def weights(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 2])
def test_each_dtype_is_rounded_once_from_the_exact_result(tmp_path, source, dtype, rank):
    base, aligned = pair_of(tmp_path, DTYPES[source])
    extrapolate(base, aligned, tmp_path / "out", options=Options(rank=rank, alpha=0.5, dtype=dtype))
    w0, w1, out = weights(base), weights(aligned), weights(tmp_path / "out")
    assert out.keys() == w1.keys()
    assert torch.equal(out["position_ids"], w1["position_ids"])
    for name, shape in SHAPES.items():
        assert out[name].dtype == DTYPES[dtype]
        if len(shape) == 1:
            assert torch.equal(out[name], rounded_once(w1[name].double(), DTYPES[dtype]))
            continue
        exact = extrapolated(w1[name], w0[name], rank or min(shape[-2:]), 0.5)
        if dtype == "float32":
            torch.testing.assert_close(out[name].double(), exact, rtol=2e-5, atol=2e-5)
        else:
            wrong = int((out[name] != rounded_once(exact, DTYPES[dtype])).sum())
            assert wrong <= 0.001 * exact.numel() + 1, name


@pytest.mark.parametrize("asked", ["float16", "bfloat16"])
def test_what_already_has_the_dtype_is_written_with_the_very_bytes(tmp_path, asked):
    base, aligned = pair_of(tmp_path, DTYPES[asked])
    extrapolate(base, aligned, tmp_path / "same", options=Options(rank=2))
    extrapolate(base, aligned, tmp_path / "asked", options=Options(rank=2, dtype=asked))
    name = "model.safetensors"
    assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "asked" / name).read_bytes()


def test_16_bits_round_stochastically_with_the_words_of_their_places(tmp_path):
    """As where aligned has those bits already: W1 in float32 holds the same numbers."""
    base, aligned = pair_of(tmp_path, torch.bfloat16)
    wide = write(tmp_path / "wide", {n: t.float() if t.is_floating_point() else t for n, t in weights(aligned).items()})
    options = {"rank": 2, "alpha": 0.01, "rounding": "stochastic", "tolerance": 1e-6}
    extrapolate(base, aligned, tmp_path / "narrow", options=Options(**options))
    extrapolate(base, wide, tmp_path / "out", options=Options(**options, dtype="bfloat16"))
    expected, found = weights(tmp_path / "narrow"), weights(tmp_path / "out")
    for name in SHAPES:
        assert (expected[name] != found[name]).double().mean() < 0.002, name


def test_config_json_says_the_new_dtype_and_all_else(tmp_path):
    base, aligned = pair_of(tmp_path, torch.bfloat16)
    extrapolate(base, aligned, tmp_path / "out", options=Options(dtype="float16"))
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == CONFIG | {"torch_dtype": "float16", "text_config": {"dtype": "float16"}}
    assert [check.message for check in verify_checksums(tmp_path / "out") if not check.ok] == []


def test_a_vector_that_is_wider_than_every_matrix_stays_so(tmp_path):
    bias = torch.full((3,), 1 + 2.0**-20)
    base, aligned = pair_of(tmp_path, torch.bfloat16, **{"model.layers.0.mlp.router.bias": bias})
    extrapolate(base, aligned, tmp_path / "out", options=Options(dtype="float16"))
    out = weights(tmp_path / "out")
    assert torch.equal(out["model.layers.0.mlp.router.bias"], bias)
    assert out["model.norm.weight"].dtype == torch.float16


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.attn.q.weight"])
def test_what_is_beyond_the_dtype_is_an_error_and_no_infinity(tmp_path, name):
    large = torch.full(SHAPES[name], 1e5)
    base, aligned = pair_of(tmp_path, torch.float32, **{name: large})
    with pytest.raises(DataError, match=f"{name}.*beyond the range of float16"):
        extrapolate(base, aligned, tmp_path / "out", options=Options(dtype="float16", skip=("*q.weight",)))


@pytest.mark.parametrize("on_nonfinite", ["error", "copy"])
def test_weights_that_are_the_same_and_beyond_the_dtype_are_told_by_name(tmp_path, on_nonfinite):
    name = "model.layers.0.attn.q.weight"
    base, aligned = pair_of(tmp_path, torch.float32)
    for side in (base, aligned):
        tensors = load_file(side / "model.safetensors") | {name: torch.full(SHAPES[name], 1e5)}
        save_file(tensors, side / "model.safetensors")
    asked = Options(dtype="float16", on_nonfinite=on_nonfinite)
    with pytest.raises(DataError, match=rf"{name}: 100000 is beyond the range of float16.*Write a wider --dtype"):
        extrapolate(base, aligned, tmp_path / "out", options=asked)


def test_a_tensor_without_elements_is_written_in_another_dtype(tmp_path):
    base, aligned = pair_of(tmp_path, torch.float32, nothing=torch.zeros(0, 4))
    extrapolate(base, aligned, tmp_path / "out", options=Options(dtype="bfloat16"))
    assert weights(tmp_path / "out")["nothing"].shape == (0, 4)
    options, units = units_of(tmp_path / "out", base, aligned)
    assert all(compare(unit, options).ok for unit in units)
    assert dict(stream(base, aligned, options=options))["nothing"].dtype == torch.bfloat16


def test_verify_recomputes_what_was_written_in_another_dtype(tmp_path):
    base, aligned = pair_of(tmp_path, torch.float32)
    options = Options(rank=2, dtype="bfloat16", skip=("*embed*",), split_fused=True)
    extrapolate(base, aligned, tmp_path / "out", options=options)
    options, units = units_of(tmp_path / "out", base, aligned)
    seen = [compare(unit, options) for unit in units]
    assert {unit.name for unit in units} > {"model.embed_tokens.weight", "model.layers.1.attn.qkv_proj.weight[k]"}
    assert [one.name for one in seen if not one.ok] == []


def test_a_stream_yields_what_a_run_writes(tmp_path):
    base, aligned = pair_of(tmp_path, torch.float32)
    options = Options(rank=2, dtype="float16", max_shard_size=4000)
    extrapolate(base, aligned, tmp_path / "out", options=options)
    out = weights(tmp_path / "out")
    for name, tensor in stream(base, aligned, options=options):
        assert tensor.dtype == out[name].dtype
        assert torch.equal(tensor, out[name]), name


def test_files_are_of_even_size_under_the_limit_and_hold_the_same_tensors(tmp_path):
    base, aligned = pair_of(tmp_path, torch.bfloat16)
    extrapolate(base, aligned, tmp_path / "one")
    extrapolate(base, aligned, tmp_path / "many", options=Options(max_shard_size=4000))
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in many.values())
    for path in files:
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = list(opened.keys())
        for name in names:
            assert index["weight_map"][name] == path.name
            assert torch.equal(many[name], one[name])
        held = sum(many[name].numel() * many[name].element_size() for name in names)
        assert held <= 4000 or len(names) == 1
    assert many.keys() == one.keys() == index["weight_map"].keys()
    assert all(check.ok for check in verify_checksums(tmp_path / "many"))


def test_many_files_become_one_without_an_index(tmp_path):
    base, aligned = pair_of(tmp_path, torch.bfloat16)
    extrapolate(base, aligned, tmp_path / "many", options=Options(rank=0, alpha=0.0, max_shard_size=4000))
    (tmp_path / "many" / "lox_stream.json").unlink()
    extrapolate(base, tmp_path / "many", tmp_path / "one", options=Options(max_shard_size=10**9))
    extrapolate(base, aligned, tmp_path / "direct")
    assert sorted(path.name for path in (tmp_path / "one").glob("model*")) == ["model.safetensors"]
    one, direct = weights(tmp_path / "one"), weights(tmp_path / "direct")
    assert all(torch.equal(one[name], direct[name]) for name in direct)


def test_each_component_of_a_pipeline_has_files_of_its_own(tmp_path):
    for side in ("base", "aligned"):
        for number, part in enumerate(("transformer", "vae")):
            generator = torch.Generator().manual_seed(number)
            base = {f"block.{i}.weight": torch.randn(16, 16, generator=generator) for i in range(4)}
            if side == "aligned":
                base = {name: t + 0.1 * torch.randn(16, 16, generator=generator) for name, t in base.items()}
            write(tmp_path / side / part, {}, torch_dtype="float32")
            (tmp_path / side / part / "model.safetensors").unlink()
            save_file(base, tmp_path / side / part / "diffusion_pytorch_model.safetensors")
        said = {"_class_name": "Pipe", "transformer": ["diffusers", "A"], "vae": ["diffusers", "B"]}
        (tmp_path / side / "model_index.json").write_text(json.dumps(said))
    options = Options(rank=1, dtype="bfloat16", max_shard_size=1024)
    extrapolate(tmp_path / "base", tmp_path / "aligned", tmp_path / "out", options=options)
    for part in ("transformer", "vae"):
        names = sorted(path.name for path in (tmp_path / "out" / part).iterdir())
        assert names == [
            "config.json",
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            "diffusion_pytorch_model-00002-of-00002.safetensors",
            "diffusion_pytorch_model.safetensors.index.json",
        ]
        assert json.loads((tmp_path / "out" / part / "config.json").read_text())["torch_dtype"] == "bfloat16"
        found = weights(tmp_path / "out" / part)
        assert found.keys() == {f"block.{i}.weight" for i in range(4)}
    assert all(check.ok for check in verify_checksums(tmp_path / "out"))


@pytest.mark.parametrize("limit", [1, 10, 100, 1000])
def test_balanced_files_are_the_fewest_and_the_largest_is_as_small_as_can_be(limit):
    rng = torch.Generator().manual_seed(limit)
    sizes = torch.randint(0, 60, (12,), generator=rng).tolist()
    found = [sum(sizes[run]) for run in balanced(sizes, limit)]
    assert sum(found) == sum(sizes)
    assert all(
        total <= limit or len(sizes[run]) - sizes[run].count(0) == 1
        for total, run in zip(found, balanced(sizes, limit), strict=True)
    )
    best: dict[int, int] = {}
    for cuts in range(1 << 11):  # each way to cut twelve sizes into runs
        runs, held = [], 0
        for i, size in enumerate(sizes):
            held += size
            if i == 11 or cuts >> i & 1:
                runs.append(held)
                held = 0
        best[len(runs)] = min(best.get(len(runs), 10**9), max(runs))
    fewest = min(count for count, largest in best.items() if largest <= max(limit, *sizes))
    assert len(found) == fewest or max(sizes) > limit
    if max(sizes) <= limit:
        assert max(found) == best[fewest]


def test_the_plan_says_what_is_written(tmp_path):
    base, aligned = pair_of(tmp_path, torch.float32)
    made = plan(base, aligned, tmp_path / "out", options=Options(dtype="bfloat16", max_shard_size=4000))
    assert len(made.written.shards) > 1
    assert {step.dtype for step in made.steps if step.name != "position_ids"} == {"BF16"}
