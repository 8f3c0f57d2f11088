"""Weights of FP8: computed with as the numbers they stand for, written with fresh scales, or in another dtype."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from exactly import extrapolated
from folders import write
from safetensors.torch import load_file, save_file

from lox_stream import Options, extrapolate, fp8, inspecting, plan, stream
from lox_stream.errors import CheckpointError, DataError, LoxError
from lox_stream.journal import replay
from lox_stream.pipeline import Finished, compute
from lox_stream.planning import plan_summary
from lox_stream.recomputing import compare, rounded_once
from lox_stream.sampling import units_of
from lox_stream.scales import Blocks, blocks_of
from lox_stream.verifying import verify_checksums
from lox_stream.writer import Output

UP = "model.layers.0.up.weight"
SHAPES = {UP: (200, 300), "model.layers.0.down.weight": (300, 200)}
DEEPSEEK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
OURS = {"config_groups": {"group_0": {"weights": {"block_structure": [64, 32]}}}, "quant_method": "compressed-tensors"}
KINDS = {  # suffix, shape of the scales, their dtype, the weights' dtype, config
    "deepseek": ("_scale_inv", lambda m, n: (-(-m // 128), -(-n // 128)), torch.float32, torch.float8_e4m3fn, DEEPSEEK),
    "block": ("_scale", lambda m, n: (-(-m // 64), -(-n // 32)), torch.bfloat16, torch.float8_e4m3fn, OURS),
    "channel": ("_scale", lambda m, n: (m, 1), torch.bfloat16, torch.float8_e4m3fn, {}),
    "tensor": ("_scale", lambda m, n: (), torch.float32, torch.float8_e5m2, {}),
}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def spread(scale, shape, kind):
    """The scale of each element, float64, written without the program's code."""
    m, n = shape
    grid = scale.double()
    if kind in ("tensor", "channel"):
        return grid.expand(m, n)
    rows, columns = (128, 128) if kind == "deepseek" else (64, 32)
    return grid.repeat_interleave(rows, 0)[:m].repeat_interleave(columns, 1)[:, :n]


def stored(weight, kind):
    """A weight as that kind stores it: (q, scale)."""
    _, shape, scale_dtype, dtype, _ = KINDS[kind]
    m, n = weight.shape
    largest = torch.zeros(shape(m, n), dtype=torch.float64)
    which = spread(torch.arange(largest.numel(), dtype=torch.float64).reshape(largest.shape), (m, n), kind).long()
    largest.view(-1).scatter_reduce_(0, which.reshape(-1), weight.double().abs().reshape(-1), "amax")
    scale = (largest / LARGEST[dtype]).to(scale_dtype)
    return (weight.double() / spread(scale, (m, n), kind)).clamp(-LARGEST[dtype], LARGEST[dtype]).float().to(
        dtype
    ), scale


def numbers(tensors, name, kind):
    """What a stored weight stands for, in float64."""
    scale = tensors[name + KINDS[kind][0]]
    return tensors[name].double() * spread(scale, tensors[name].shape, kind)


def side_of(weights, kind):
    tensors = {"model.norm.weight": torch.ones(300, dtype=torch.bfloat16)}
    for name, weight in weights.items():
        q, scale = stored(weight, kind)
        tensors |= {name: q, name + KINDS[kind][0]: scale, name.replace("weight", "input_scale"): torch.ones(())}
    return tensors


def pair_of(root, kind, base_kind=None):
    generator = torch.Generator().manual_seed(3)
    base = {name: 0.02 * torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
    change = {
        name: 0.02 * torch.randn(m, 4, generator=generator) @ torch.randn(4, n, generator=generator)
        for name, (m, n) in SHAPES.items()
    }
    aligned = {name: weight + change[name] for name, weight in base.items()}
    config = {"torch_dtype": "bfloat16", "quantization_config": KINDS[kind][4] or {"quant_method": "fbgemm_fp8"}}
    below = side_of(base, base_kind) if base_kind else {name: weight.bfloat16() for name, weight in base.items()}
    below.setdefault("model.norm.weight", torch.ones(300, dtype=torch.bfloat16))
    more = {"quantization_config": KINDS[base_kind][4] or {"quant_method": "x"}} if base_kind else {}
    return write(root / "base", below, **more), write(root / "aligned", side_of(aligned, kind), **config)


def tensors_of(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def base_numbers(tensors, name, kind):
    return tensors[name].double() if kind is None else numbers(tensors, name, kind)


@pytest.mark.parametrize(
    ("kind", "base_kind"), [*((kind, kind) for kind in KINDS), ("deepseek", None), ("channel", "block")]
)
@pytest.mark.parametrize("rank", [0, 2])
def test_the_result_is_rounded_once_to_fp8_with_fresh_scales(tmp_path, kind, base_kind, rank):
    base, aligned = pair_of(tmp_path, kind, base_kind)
    extrapolate(base, aligned, tmp_path / "out", options=Options(rank=rank, alpha=1.25))
    below, before, after = tensors_of(base), tensors_of(aligned), tensors_of(tmp_path / "out")
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    for name in SHAPES:
        exact = extrapolated(numbers(before, name, kind), base_numbers(below, name, base_kind), rank or 999, 1.25)
        q, scale = stored(exact, kind)
        torch.testing.assert_close(
            after[name + KINDS[kind][0]], scale, rtol=1e-2 if scale.dtype == torch.bfloat16 else 1e-5, atol=0
        )
        same = (after[name].view(torch.uint8) == q.view(torch.uint8)).double().mean()
        assert same > 0.998, name
        assert not torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
    assert all(check.ok for check in verify_checksums(tmp_path / "out"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_another_dtype_gives_a_plain_checkpoint(tmp_path, dtype):
    base, aligned = pair_of(tmp_path, "deepseek", "deepseek")
    options = Options(rank=2, dtype=dtype, skip=("*down*",))
    extrapolate(base, aligned, tmp_path / "out", options=options)
    below, before, after = tensors_of(base), tensors_of(aligned), tensors_of(tmp_path / "out")
    assert not [name for name in after if "_scale_inv" in name]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    up, down = SHAPES
    plain = numbers(before, down, "deepseek")
    assert torch.equal(after[down], rounded_once(plain.float().double(), getattr(torch, dtype)))
    exact = extrapolated(numbers(before, up, "deepseek"), numbers(below, up, "deepseek"), 2, 1.25)
    if dtype == "bfloat16":
        assert (after[up] == rounded_once(exact, torch.bfloat16)).double().mean() > 0.9995
    else:
        torch.testing.assert_close(after[up].double(), exact, rtol=1e-4, atol=1e-6)
    options, units = units_of(tmp_path / "out", base, aligned)
    assert [one.name for one in (compare(unit, options) for unit in units) if not one.ok] == []


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", KINDS)
def test_verify_recomputes_fp8(tmp_path, kind, rounding):
    base, aligned = pair_of(tmp_path, kind, kind)
    extrapolate(base, aligned, tmp_path / "out", options=Options(rank=2, rounding=rounding, skip=("*down*",)))
    options, units = units_of(tmp_path / "out", base, aligned)
    seen = [compare(unit, options) for unit in units]
    assert {one.name for one in seen} >= set(SHAPES)
    assert [one.name for one in seen if not one.ok] == []
    path = tmp_path / "out" / "model.safetensors"
    tensors = tensors_of(tmp_path / "out")
    tensors["model.layers.0.up.weight"].view(torch.uint8)[3, :200] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    spoiled = [compare(unit, options) for unit in units_of(tmp_path / "out", base, aligned)[1]]
    assert [one.name for one in spoiled if not one.ok] == ["model.layers.0.up.weight"]


def test_retention_is_what_fp8_leaves_and_stochastic_rounding_leaves_all_of_it_on_average(tmp_path):
    base, aligned = pair_of(tmp_path, "deepseek", "deepseek")
    kept = {}
    for rounding in ("nearest", "stochastic"):
        options = Options(rank=2, alpha=0.002, rounding=rounding)
        kept[rounding] = extrapolate(base, aligned, tmp_path / rounding, options=options).totals.retention
    assert kept["nearest"] < 0.7
    assert abs(kept["stochastic"] - 1) < 0.3


def test_what_does_not_change_keeps_its_bytes_and_its_scales(tmp_path):
    base, aligned = pair_of(tmp_path, "deepseek", "deepseek")
    shutil.rmtree(base)
    shutil.copytree(aligned, base)
    changed = tensors_of(base)
    changed["model.norm.weight"] += 1
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    extrapolate(base, aligned, tmp_path / "out")
    before, after = tensors_of(aligned), tensors_of(tmp_path / "out")
    assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in SHAPES)


def test_a_weight_and_its_scales_are_made_anew_together_by_a_resume_and_a_repair(tmp_path):
    base, aligned = pair_of(tmp_path, "deepseek", "deepseek")
    extrapolate(base, aligned, tmp_path / "whole")
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    made = plan(base, aligned, tmp_path / "out")
    with pytest.raises(RuntimeError, match="on purpose"):
        _interrupted(made)
    finished = replay(tmp_path / "out").finished
    assert "model.layers.0.down.weight_scale_inv" in finished
    assert "model.layers.0.down.weight" not in finished
    extrapolate(base, aligned, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
    for name in ("model.layers.0.up.weight", "model.layers.0.up.weight_scale_inv"):
        info = made.written.tensors[name]
        with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
            file.seek(info.start + 1)
            file.write(b"\x55")
        extrapolate(base, aligned, tmp_path / "out", resume=True, repair=True)
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def _interrupted(made):
    """Ends when the first scales are finished, and what they belong to is not recorded."""
    with Output(made) as output:
        for event in compute(made.steps, lambda step: output.place(step.name), made.options):
            if isinstance(event, Finished) and not event.step.name.endswith("weight"):
                output.done(event.facts)
            if "down.weight_scale_inv" in " ".join(output.finished):
                raise RuntimeError("on purpose")


def test_a_stream_yields_weights_and_scales_as_they_are_written(tmp_path):
    base, aligned = pair_of(tmp_path, "channel", "channel")
    extrapolate(base, aligned, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    found = dict(stream(base, aligned))
    assert list(found) == [info.name for info in plan(base, aligned).aligned.shards[0].tensors]
    assert all(
        torch.equal(t.view(-1).view(torch.uint8), after[name].view(-1).view(torch.uint8)) for name, t in found.items()
    )


def test_fp8_without_a_scale_that_fits_is_refused_by_name(tmp_path):
    base, aligned = pair_of(tmp_path, "channel", "channel")
    tensors = tensors_of(aligned)
    for scale, why in (
        (
            torch.ones(7, 1),
            r"of shape \(200, 300\) with a scale of shape \(7, 1\), .* \(2, 3\) for blocks of 128 x 128",
        ),
        (torch.ones(200, dtype=torch.float64), "with a scale of F64, expected F32, BF16, F16"),
        (None, "without a scale beside it"),
    ):
        tensors["model.layers.0.up.weight_scale"] = scale
        if scale is None:
            del tensors["model.layers.0.up.weight_scale"]
        save_file(tensors, aligned / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            CheckpointError, match=rf"aligned: quantised tensors \(F8_E4M3 {why}\): found model.layers.0.up.weight"
        ):
            plan(base, aligned)


def test_scales_that_are_made_anew_are_called_so(tmp_path):
    base, aligned = pair_of(tmp_path, "channel", "channel")
    skip = Options(skip=(UP,))
    for options, count in ((Options(), 2), (skip, 1), (Options(alpha=0), 0)):
        summary = plan_summary(plan(base, aligned, options=options))
        totals = summary["totals"]
        assert totals["rescaled_tensors"] == count
        assert totals["tensors"] == sum(totals[f"{what}_tensors"] for what in ("extrapolated", "copied", "rescaled"))
        assert totals["bytes"] == sum(totals[f"{what}_bytes"] for what in ("extrapolated", "copied", "rescaled"))
        seen = inspecting.inspect_checkpoint(aligned, options)
        said = {row.name: row.action for row in seen.rows}
        assert said == {step["name"]: step["action"] for step in summary["steps"]}
    done = extrapolate(base, aligned, tmp_path / "out", options=skip).totals
    assert (done.extrapolated, done.rescaled, done.copied) == (1, 1, done.tensors - 2)
    assert "1 of scales made anew" in (tmp_path / "out" / "README.md").read_text()


def test_scales_follow_their_weights_whatever_is_said_of_them(tmp_path):
    base, aligned = pair_of(tmp_path, "channel", "channel")
    for options in (Options(skip=("*weight_scale",)), Options(only=(f"{UP}_scale",))):
        with pytest.raises(LoxError, match="matches nothing but scales of FP8, which are made anew with their weights"):
            plan(base, aligned, options=options)
    assert plan(base, aligned, options=Options(skip=("*up*",)))


def test_fused_weights_of_fp8_are_said_not_to_be_split(tmp_path):
    base, aligned = pair_of(tmp_path, "channel", "channel")
    for side in (base, aligned):
        tensors = {name.replace("0.up.", "0.mlp.gate_up_proj."): t for name, t in tensors_of(side).items()}
        save_file(tensors, side / "model.safetensors", metadata={"format": "pt"})
    for warnings in (
        plan(base, aligned, options=Options(split_fused=True)).warnings,
        inspecting.inspect_checkpoint(aligned, Options(split_fused=True)).warnings,
    ):
        assert any("are of FP8, which is not split: model.layers.0.mlp.gate_up_proj.weight" in one for one in warnings)


def test_a_weight_whose_scale_is_small_in_float16_keeps_its_accuracy(tmp_path):
    weight = 1e-4 * torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    blocks, scale = Blocks(1, 60), torch.ones(40, 1, dtype=torch.float16)
    fresh, q = (
        fp8.fresh_scales(weight, torch.float8_e4m3fn, blocks, scale),
        torch.empty(40, 60, dtype=torch.float8_e4m3fn),
    )
    fp8.quantise(weight, fresh, blocks, q)
    assert (fp8.dequantised(q, fresh, blocks) - weight).norm() < 0.04 * weight.norm()


def test_rows_that_base_lacks_are_refused_for_fp8_and_taken_with_another_dtype(tmp_path):
    base, aligned = pair_of(tmp_path, "channel", "channel")
    tensors = tensors_of(aligned)
    q, scale = tensors[UP], tensors[f"{UP}_scale"]
    tensors |= {UP: torch.cat([q.view(torch.uint8)] * 2).view(q.dtype), f"{UP}_scale": torch.cat([scale] * 2)}
    save_file(tensors, aligned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expected the same shape.*overlap, of FP8 together with --dtype"):
        plan(base, aligned, options=Options(on_shape_mismatch="overlap"))
    options = Options(on_shape_mismatch="overlap", dtype="float32", rank=2)
    extrapolate(base, aligned, tmp_path / "out", options=options)
    w1 = numbers(tensors, UP, "channel")
    exact = extrapolated(w1[:200], numbers(tensors_of(base), UP, "channel"), 2, 1.25)
    torch.testing.assert_close(
        tensors_of(tmp_path / "out")[UP].double(), torch.cat([exact, w1[200:]]), rtol=1e-4, atol=1e-6
    )


def test_a_plain_checkpoint_has_no_scales_and_nothing_quantised(tmp_path):
    base, aligned = pair_of(tmp_path, "deepseek", None)
    assert not plan(base, aligned).warnings
    extrapolate(base, aligned, tmp_path / "out", options=Options(dtype="bfloat16"))
    assert not [name for name in tensors_of(tmp_path / "out") if "scale" in name]
    tensors = tensors_of(aligned) | {"q.weight": torch.ones(4, 4, dtype=torch.int8), "q.SCB": torch.full((4,), 1e-8)}
    save_file(tensors, aligned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoxError, match=r"--dtype float16: aligned holds quantised tensors.*bitsandbytes"):
        plan(base, aligned, options=Options(skip=("q.*",), dtype="float16"))


def test_a_base_of_fp8_has_no_scales_that_are_not_used(tmp_path):
    base, aligned = pair_of(tmp_path, "deepseek", "channel")
    assert not [warning for warning in plan(base, aligned).warnings if "not used" in warning]


def test_nan_in_fp8_is_found(tmp_path):
    base, aligned = pair_of(tmp_path, "deepseek", "deepseek")
    tensors = tensors_of(aligned)
    tensors["model.layers.0.up.weight"].view(torch.uint8)[5, 7] = 0x7F
    save_file(tensors, aligned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"up.weight: aligned has nan at \[5, 7\]"):
        extrapolate(base, aligned, tmp_path / "out")
    extrapolate(base, aligned, tmp_path / "copied", options=Options(on_nonfinite="copy"))
    after = tensors_of(tmp_path / "copied")
    for name in ("model.layers.0.up.weight", "model.layers.0.up.weight_scale_inv"):
        assert torch.equal(after[name].view(torch.uint8), tensors[name].view(torch.uint8))


def test_inspect_says_what_fp8_is(tmp_path):
    _, aligned = pair_of(tmp_path, "deepseek", "deepseek")
    rows = {row.name: row for row in inspecting.inspect_checkpoint(aligned).rows}
    assert rows["model.layers.0.up.weight"].action == "extrapolate"
    assert rows["model.layers.0.up.weight_scale_inv"].reason == "scales"


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("blocks", [Blocks(128, 128), Blocks(1, 300), Blocks(200, 300), Blocks(64, 32)])
def test_what_was_fp8_comes_back_as_it_was(blocks, dtype):
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(blocks.grid(200, 300), generator=generator)
    total = torch.randn(200, 300, generator=generator)
    fresh, q, again = fp8.fresh_scales(total, dtype, blocks, scale), torch.empty(200, 300, dtype=dtype), None
    fp8.quantise(total, fresh, blocks, q)
    again = torch.empty_like(q)
    whole = fp8.dequantised(q, fresh, blocks)
    fp8.quantise(whole, fp8.fresh_scales(whole, dtype, blocks, scale), blocks, again)
    assert torch.equal(q.view(torch.uint8), again.view(torch.uint8))


@pytest.mark.parametrize("dtype", LARGEST)
def test_stochastic_rounding_to_fp8_is_right_on_average(dtype):
    blocks, scale = Blocks(1, 64), torch.full((8, 1), 2.0**-4)
    total = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    mean, q = torch.zeros(8, 64), torch.empty(8, 64, dtype=dtype)
    for i in range(400):
        fp8.quantise(total, scale, blocks, q, (i, 7))
        mean += fp8.dequantised(q, scale, blocks) / 400
    step = total.abs() * torch.finfo(dtype).eps
    assert ((mean - total).abs() <= 6 * step / 400**0.5 + 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_blocks_of_tiny_numbers_and_of_zeros_give_numbers(dtype):
    blocks, total = Blocks(1, 8), torch.tensor([[1e-9], [0.0], [1e-40]]).expand(3, 8)
    fresh = fp8.fresh_scales(total, torch.float8_e4m3fn, blocks, torch.full((3, 1), 0.3, dtype=dtype))
    q = torch.empty(3, 8, dtype=torch.float8_e4m3fn)
    fp8.quantise(total, fresh, blocks, q)
    wrong = (fp8.dequantised(q, fresh, blocks) - total).abs()
    finfo = torch.finfo(dtype)
    assert (wrong <= 0.07 * total + finfo.tiny * finfo.eps).all()


def test_scales_that_are_powers_of_two_stay_so():
    blocks, total = Blocks(128, 128), torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    fresh = fp8.fresh_scales(total, torch.float8_e4m3fn, blocks, torch.full((2, 3), 2.0**-7))
    assert (torch.frexp(fresh)[0] == 0.5).all()
    assert (total.abs().max() / fresh.max()) <= 448


def test_blocks_follow_the_config_where_it_says_them():
    assert blocks_of((256, 96), (4, 3), {"quantization_config": OURS}) == Blocks(64, 32)
    assert blocks_of((256, 96), (2, 1), {"quantization_config": DEEPSEEK}) == Blocks(128, 128)
    assert blocks_of((256, 96), (4, 3), {}) is None
    assert blocks_of(
        (260, 260), (3, 3), {"text_config": {"quantization_config": {"weight_block_size": [100, 100]}}}
    ) == (Blocks(100, 100))
