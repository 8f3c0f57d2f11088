"""LoRA adapters in place of an aligned model: what they add, to what, and what is refused. Folders made by hand."""

from __future__ import annotations

import json
import math
import os
import random
import threading
from pathlib import Path
from typing import Any

import exactly
import folders
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from lox_stream import (
    CheckpointError,
    DataError,
    MemoryBudgetError,
    OptionError,
    Options,
    ResumeError,
    execute,
    extrapolate,
    files,
    plan,
    stream,
)
from lox_stream.adapters import is_adapter, open_adapter
from lox_stream.cli import commands
from lox_stream.errors import Cancelled
from lox_stream.inspecting import inspect_checkpoint
from lox_stream.planning import card_memory_needed, plan_summary
from lox_stream.recomputing import compare_all, rounded_once
from lox_stream.sampling import choose_sample

Q, EMBED, HEAD = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
SHARE = 0.9995  # of elements that have the oracle's bits


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def base_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {
        EMBED: normal(96, 64, seed=1).to(dtype),
        Q: normal(80, 64, seed=2).to(dtype),
        "model.layers.0.mlp.up_proj.weight": normal(64, 64, seed=3).to(dtype),
        "model.norm.weight": normal(64, seed=4).to(dtype),
    }


def factors(name: str, m: int, n: int, r: int = 8, seed: int = 9) -> dict[str, Tensor]:
    """Of a linear layer, in float32."""
    at = f"base_model.model.{name.removesuffix('.weight')}"
    a, b = normal(r, n, seed=seed, scale=0.1), normal(m, r, seed=seed + 1, scale=0.1)
    return {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture
def pair(tmp_path):
    """A base of which an adapter changes one matrix."""
    base = folders.write(tmp_path / "base", base_tensors())
    return base, write_adapter(tmp_path / "adapter", factors(Q, 80, 64)), tmp_path / "out"


@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"skip": ("*",)}])
@pytest.mark.parametrize("on_nonfinite", ["error", "copy"])
def test_a_sum_beyond_the_dtype_is_an_error_and_never_an_infinity(pair, options, on_nonfinite):
    base, adapter, out = pair
    write_adapter(adapter, {name: 1e4 * tensor for name, tensor in factors(Q, 80, 64).items()})
    asked = Options(dtype="float16", on_nonfinite=on_nonfinite, **options)
    with pytest.raises(DataError, match="beyond the range"):
        extrapolate(base, adapter, out, options=asked)


def right(w0: Tensor, delta: Tensor, rank: int, alpha: float) -> Tensor:
    """W0 + delta + alpha * rank-k part of delta, rounded once to the dtype of W0."""
    total = exactly.extrapolated(w0.double() + delta, w0.double(), rank, alpha)
    return rounded_once(total, w0.dtype)


def product(tensors: dict[str, Tensor], scaling: float) -> Tensor:
    a, b = (next(t for name, t in tensors.items() if f".lora_{side}" in name) for side in "AB")
    return scaling * b.double() @ a.double()


def agreeing(out: Tensor, expected: Tensor) -> float:
    return float((out == expected).double().mean())


def written(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def problems_of(base: Path, adapter: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan(base, adapter, options=Options(**options))
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 1, 6, 8, 20])
def test_the_sum_is_rounded_once_to_the_bits_of_float64(rank, dtype, tmp_path):
    """A rank of 0, and one that is no less than the adapter's, take the whole change."""
    base = folders.write(tmp_path / "base", base_tensors(dtype))
    given = factors(Q, 80, 64)
    extrapolate(base, write_adapter(tmp_path / "adapter", given), tmp_path / "out", options=Options(rank))
    w0, out = base_tensors(dtype)[Q], written(tmp_path / "out")[Q]
    assert agreeing(out, right(w0, product(given, 2.0), rank or 64, 1.25)) >= SHARE
    merged_first = rounded_once(w0.double() + product(given, 2.0), dtype)
    twice = rounded_once(exactly.extrapolated(merged_first, w0, rank or 64, 1.25), dtype)
    assert agreeing(out, twice) < 0.9, "this is more exact than merging first"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_outputs_are_right_to_their_own_precision(dtype, tmp_path):
    base = folders.write(tmp_path / "base", base_tensors(dtype))
    given = factors(Q, 80, 64)
    extrapolate(base, write_adapter(tmp_path / "adapter", given), tmp_path / "out", options=Options(3))
    w0 = base_tensors(dtype)[Q]
    expected = exactly.extrapolated(w0.double() + product(given, 2.0), w0.double(), 3, 1.25)
    error = (written(tmp_path / "out")[Q].double() - expected).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_what_the_adapter_does_not_touch_is_bases_byte_for_byte(pair):
    base, adapter, out = pair
    summary = extrapolate(base, adapter, out)
    assert (summary.totals.extrapolated, summary.totals.copied, summary.totals.identical) == (1, 3, 0)
    header = (base / "model.safetensors").read_bytes()[:400]
    assert (out / "model.safetensors").read_bytes()[:400] == header
    for name, tensor in base_tensors().items():
        assert torch.equal(written(out)[name], tensor) == (name != Q)


@pytest.mark.parametrize("options", [Options(alpha=0), Options(skip=("*q_proj*",)), Options(only=("*up_proj*",))])
def test_a_tensor_that_is_left_alone_is_the_aligned_one_which_the_two_make(options, pair):
    base, adapter, out = pair
    extrapolate(base, adapter, out, options=options)
    row = json.loads((out / "lox_stream.json").read_text())["tensors"][Q]
    assert row["action"] == "merge"
    assert row["reason"] in ("merged", "skipped")
    assert [matrix["method"] for matrix in row["matrices"]] == ["merged"]
    delta = product(factors(Q, 80, 64), 2.0)
    assert agreeing(written(out)[Q], rounded_once(base_tensors()[Q].double() + delta, torch.bfloat16)) >= SHARE


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 4}, 0.5),
        ({"use_rslora": True}, 16 / math.sqrt(8)),
        ({"r": 4, "rank_pattern": {"q_proj": 8}}, 2.0),
        ({"alpha_pattern": {"up_proj": 5, r"layers\.0\.self_attn\..*": 24, "q_proj": 1}}, 3.0),
        ({"alpha_pattern": {"proj": 1, "^model.layers.0.self_attn.q_proj": 32}}, 4.0),
    ],
)
def test_the_scaling_is_what_peft_reads_out_of_the_config(config, scaling, tmp_path):
    adapter = write_adapter(tmp_path, factors(Q, 80, 64), **config)
    (module,) = open_adapter(adapter).modules
    assert module.scaling == pytest.approx(scaling)


def test_an_embedding_is_changed_by_the_transpose(tmp_path):
    base = folders.write(tmp_path / "base", base_tensors())
    a, b = normal(8, 96, seed=5, scale=0.1), normal(64, 8, seed=6, scale=0.1)
    at = "base_model.model.model.embed_tokens.lora_embedding_"
    adapter = write_adapter(tmp_path / "adapter", {f"{at}A": a, f"{at}B": b})
    extrapolate(base, adapter, tmp_path / "out", options=Options(3))
    delta = 2.0 * (b.double() @ a.double()).T
    assert agreeing(written(tmp_path / "out")[EMBED], right(base_tensors()[EMBED], delta, 3, 1.25)) >= SHARE


@pytest.mark.parametrize("said", [False, True])
def test_a_turned_weight_is_told_by_its_shape(said, tmp_path):
    base = folders.write(tmp_path / "base", {"h.0.mlp.c_fc.weight": normal(64, 80).bfloat16()})
    given = factors("h.0.mlp.c_fc", 80, 64)
    adapter = write_adapter(tmp_path / "adapter", given, fan_in_fan_out=said)
    extrapolate(base, adapter, tmp_path / "out", options=Options(3))
    expected = right(normal(64, 80).bfloat16(), product(given, 2.0).T, 3, 1.25)
    assert agreeing(written(tmp_path / "out")["h.0.mlp.c_fc.weight"], expected) >= SHARE


@pytest.mark.parametrize("said", [False, True])
def test_a_square_weight_is_turned_where_the_config_says_so(said, tmp_path):
    base = folders.write(tmp_path / "base", {"h.0.attn.c_proj.weight": normal(64, 64).bfloat16()})
    given = factors("h.0.attn.c_proj", 64, 64)
    adapter = write_adapter(tmp_path / "adapter", given, fan_in_fan_out=said)
    extrapolate(base, adapter, tmp_path / "out", options=Options(3))
    delta = product(given, 2.0)
    expected = right(normal(64, 64).bfloat16(), delta.T if said else delta, 3, 1.25)
    assert agreeing(written(tmp_path / "out")["h.0.attn.c_proj.weight"], expected) >= SHARE


def test_a_square_weight_is_refused_where_another_one_speaks_against_the_config(tmp_path):
    names = {"h.0.attn.c_proj.weight": normal(64, 64), "h.0.mlp.c_fc.weight": normal(64, 80)}
    base = folders.write(tmp_path / "base", names)
    given = factors("h.0.attn.c_proj", 64, 64) | factors("h.0.mlp.c_fc", 80, 64)
    assert "fan_in_fan_out False, but h.0.mlp.c_fc.weight" in problems_of(base, write_adapter(tmp_path / "a", given))
    plan(base, write_adapter(tmp_path / "b", given, fan_in_fan_out=True))


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (1, 1)])
def test_a_convolution_is_one_matrix(kernel, tmp_path):
    w0 = normal(48, 16, *kernel).bfloat16()
    base = folders.write(tmp_path / "base", {"conv1.weight": w0})
    a, b = normal(8, 16, *kernel, seed=1, scale=0.1), normal(48, 8, *[1] * len(kernel), seed=2, scale=0.1)
    given = {"base_model.model.conv1.lora_A.weight": a, "base_model.model.conv1.lora_B.weight": b}
    extrapolate(base, write_adapter(tmp_path / "adapter", given), tmp_path / "out", options=Options(3))
    delta = 2.0 * b.double().flatten(1) @ a.double().flatten(1)
    expected = right(w0.flatten(1), delta, 3, 1.25).view(w0.shape)
    assert agreeing(written(tmp_path / "out")["conv1.weight"], expected) >= SHARE


@pytest.mark.parametrize(
    "spelled",
    [
        "base_model.model.{}.lora_{}.default.weight",
        "{}.lora_{}.weight",
        "base_model.model.language_model.{}.lora_{}.weight",
    ],
)
def test_names_are_seen_through(spelled, pair, tmp_path):
    base, adapter, out = pair
    extrapolate(base, adapter, out)
    at = Q.removesuffix(".weight")
    given = {spelled.format(at, name.split("lora_")[1][0]): tensor for name, tensor in factors(Q, 80, 64).items()}
    extrapolate(base, write_adapter(tmp_path / "other", given), tmp_path / "again")
    assert torch.equal(written(out)[Q], written(tmp_path / "again")[Q])


def test_names_of_base_may_be_given(pair, tmp_path):
    _, adapter, out = pair
    base = folders.write(tmp_path / "net", {name.replace("self_attn", "att"): t for name, t in base_tensors().items()})
    assert "base lacks" in problems_of(base, adapter)
    extrapolate(base, adapter, out, options=Options(rename=("*.att.*=*.self_attn.*",)))
    assert not torch.equal(written(out)["model.layers.0.att.q_proj.weight"], base_tensors()[Q])


GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
STACKS = {"target_parameters": ["experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": ["q_proj"]}


def stack_factors(shapes: dict[str, tuple[int, int, int]], r: int = 8, *, turned: bool = False) -> dict[str, Tensor]:
    """Of stacks (count, m, n), as PEFT has them."""
    given = {}
    for seed, (module, (count, m, n)) in enumerate(shapes.items()):
        inner, outer = (m, n) if turned else (n, m)
        at = f"base_model.model.model.layers.0.mlp.{module}.lora_"
        given[f"{at}A.weight"] = normal(count * r, inner, seed=20 + seed, scale=0.1)
        given[f"{at}B.weight"] = normal(outer, r * count, seed=30 + seed, scale=0.1)
    return given


def stacked_change(given: dict[str, Tensor], module: str, count: int, *, turned: bool = False) -> Tensor:
    """What PEFT adds: the einsum of its `ParamWrapper`, in float64, with a scaling of two."""
    a, b = (given[f"base_model.model.model.layers.0.mlp.{module}.lora_{side}.weight"].double() for side in "AB")
    a, b = a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count)
    return 2.0 * torch.einsum("o r e, e r i -> e i o" if turned else "o r e, e r i -> e o i", b, a)


NESTED = {"experts.base_layer": (3, 72, 64), "experts": (3, 64, 36)}  # the last parameter is outermost


def stacks_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: normal(*shape, seed=seed).bfloat16() for seed, (name, shape) in enumerate(shapes.items(), 40)}


@pytest.mark.parametrize("turned", [False, True])
def test_each_matrix_of_a_stack_is_extrapolated_by_itself(turned, tmp_path):
    tensors = stacks_of({GATE_UP: (3, 72, 64), DOWN: (3, 64, 36)})
    base = folders.write(tmp_path / "base", base_tensors() | tensors)
    given = stack_factors(NESTED, turned=turned)
    folder = write_adapter(tmp_path / "adapter", given | factors(Q, 80, 64), **STACKS)
    summary = extrapolate(base, folder, tmp_path / "out", options=Options(3))
    assert summary.totals.extrapolated == 3
    out = written(tmp_path / "out")
    for name, module in ((GATE_UP, "experts.base_layer"), (DOWN, "experts")):
        delta = stacked_change(given, module, 3, turned=turned)
        expected = torch.stack([right(w0, change, 3, 1.25) for w0, change in zip(tensors[name], delta, strict=True)])
        assert agreeing(out[name], expected) >= SHARE
    rows = json.loads((tmp_path / "out" / "lox_stream.json").read_text())["tensors"]
    assert len(rows[GATE_UP]["matrices"]) == 3
    assert all(one.ok for one in compare_all(choose_sample(tmp_path / "out", base, folder, count=40)))
    extrapolate(base, folder, tmp_path / "merged", options=Options(alpha=0.0))
    delta = stacked_change(given, "experts", 3, turned=turned)
    expected = rounded_once(tensors[DOWN].double() + delta, torch.bfloat16)
    assert agreeing(written(tmp_path / "merged")[DOWN], expected) >= SHARE


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_experts_that_files_have_apart_are_changed_each_by_its_part_of_the_stack(names, tmp_path):
    gate, up, down = names
    where = "model.layers.0.mlp.experts" if gate != "w1" else "model.layers.0.block_sparse_moe.experts"
    shapes = {gate: (36, 64), up: (36, 64), down: (64, 36)}
    tensors = stacks_of({f"{where}.{i}.{name}.weight": shape for i in range(3) for name, shape in shapes.items()})
    base = folders.write(tmp_path / "base", base_tensors() | tensors)
    given = stack_factors(NESTED)
    folder = write_adapter(tmp_path / "adapter", given, **{**STACKS, "target_modules": []})
    extrapolate(base, folder, tmp_path / "out", options=Options(3))
    out = written(tmp_path / "out")
    both, below = (stacked_change(given, module, 3) for module in NESTED)
    for i in range(3):
        changes = dict(zip(names, (both[i, :36], both[i, 36:], below[i]), strict=True))
        for name, change in changes.items():
            at = f"{where}.{i}.{name}.weight"
            assert agreeing(out[at], right(tensors[at], change, 3, 1.25)) >= SHARE, at
    assert all(one.ok for one in compare_all(choose_sample(tmp_path / "out", base, folder, count=40)))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot drop pages of a file")
def test_factors_of_a_stack_stay_in_the_page_cache_for_its_next_matrix(tmp_path, monkeypatch):
    """The columns of one expert lie on all pages of B."""
    base = folders.write(tmp_path / "base", base_tensors() | stacks_of({GATE_UP: (3, 72, 64), DOWN: (3, 64, 36)}))
    folder = write_adapter(tmp_path / "adapter", stack_factors(NESTED) | factors(Q, 80, 64), **STACKS)
    dropped, real = [], files.drop_cache
    monkeypatch.setattr(
        files, "drop_cache", lambda fd, *rest: dropped.append(Path(f"/proc/self/fd/{fd}").readlink()) or real(fd, *rest)
    )
    extrapolate(base, folder, tmp_path / "out", options=Options(alpha=0.0, threads=1))
    assert dropped.count(folder / "adapter_model.safetensors") == 4, "of the one module, twice two factors"


SQUARE = {"experts.base_layer": (3, 64, 64), "experts": (3, 64, 36)}


@pytest.mark.parametrize("turned", [False, True])
def test_a_square_stack_is_turned_as_the_one_beside_it(turned, tmp_path):
    tensors = stacks_of({GATE_UP: (3, 64, 64), DOWN: (3, 64, 36)})
    base = folders.write(tmp_path / "base", tensors)
    given = stack_factors(SQUARE, turned=turned)
    extrapolate(
        base, write_adapter(tmp_path / "adapter", given, **STACKS), tmp_path / "out", options=Options(alpha=0.0)
    )
    delta = stacked_change(given, "experts.base_layer", 3, turned=turned)
    expected = rounded_once(tensors[GATE_UP].double() + delta, torch.bfloat16)
    assert agreeing(written(tmp_path / "out")[GATE_UP], expected) >= SHARE


@pytest.mark.parametrize(
    ("model", "version", "turned"),
    [
        ("gpt_oss", "0.18.0", True),
        ("gpt_oss", None, True),
        ("qwen3_moe", "0.21.2", False),
        ("qwen3_moe", "0.18.1", None),
    ],
)
def test_a_square_stack_alone_is_turned_as_its_model_has_it(model, version, turned, tmp_path):
    tensors = stacks_of({GATE_UP: (3, 64, 64)})
    base = folders.write(tmp_path / "base", tensors, model_type=model)
    given = stack_factors({"experts": (3, 64, 64)})
    said = {"target_parameters": ["gate_up_proj"], "target_modules": ["q_proj"], "peft_version": version}
    folder = write_adapter(tmp_path / "adapter", given, **said)
    if turned is None:
        assert "holds square matrices, and nothing tells" in problems_of(base, folder)
        return
    extrapolate(base, folder, tmp_path / "out", options=Options(alpha=0.0))
    delta = stacked_change(given, "experts", 3, turned=turned)
    expected = rounded_once(tensors[GATE_UP].double() + delta, torch.bfloat16)
    assert agreeing(written(tmp_path / "out")[GATE_UP], expected) >= SHARE


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"experts.base_layer": (3, 72, 64), "experts": (3, 60, 36)}, "base is (64, 36), the adapter's factors of 3"),
        ({"experts.base_layer": (2, 72, 64), "experts": (3, 64, 36)}, "gate_up_proj: base is (3, 72, 64)"),
        ({"experts": (3, 64, 36)}, "experts: has 1 pairs of factors, target_parameters names gate_up"),
        ({"others.base_layer": (3, 72, 64), "others": (3, 64, 36)}, "others: its rank is 24"),
    ],
)
def test_factors_of_another_stack_are_refused(shapes, says, tmp_path):
    base = folders.write(tmp_path / "base", stacks_of({GATE_UP: (3, 72, 64), DOWN: (3, 64, 36)}))
    folder = write_adapter(tmp_path / "adapter", stack_factors(shapes), **STACKS)
    assert says in problems_of(base, folder)


def test_the_rank_of_a_stack_is_its_parameters_own(tmp_path):
    """Patterns speak of parameters, and what is no multiple of the rank is refused."""
    base = folders.write(tmp_path / "base", stacks_of({GATE_UP: (3, 72, 64), DOWN: (3, 64, 36)}))
    given = stack_factors({"experts.base_layer": (3, 72, 64)}, 5) | stack_factors({"experts": (3, 64, 36)}, 4)
    folder = write_adapter(tmp_path / "adapter", given, **STACKS, r=4, rank_pattern={".*\\.gate_up_proj": 5})
    assert [(one.changes, one.rank, one.count) for one in open_adapter(folder).modules] == [
        (GATE_UP, 5, 3),
        (DOWN, 4, 3),
    ]
    plan(base, folder)
    write_adapter(folder, given, **STACKS, r=7)
    assert "its rank is 15, adapter_config.json says 7, or that times so many experts" in problems_of(base, folder)
    rows = inspect_checkpoint(write_adapter(folder, given, **STACKS, r=4, rank_pattern={"gate_up_proj": 5})).rows
    assert [(row.name, row.shape, row.reason) for row in rows] == [
        (GATE_UP, (3, 72, 64), "LoRA, rank 5, scaling 3.2"),
        (DOWN, (3, 64, 36), "LoRA, rank 4, scaling 4"),
    ]


def test_parameters_of_a_module_in_an_order_that_is_not_known_are_refused(tmp_path):
    base = folders.write(tmp_path / "base", stacks_of({GATE_UP: (3, 72, 64), DOWN: (3, 64, 36)}))
    folder = write_adapter(tmp_path / "a", stack_factors(NESTED), target_parameters=["experts.one", "experts.two"])
    assert "one, two are parameters whose order in it is not known" in problems_of(base, folder)


def test_a_stack_of_which_base_holds_no_numbers_is_merged_and_no_more(tmp_path):
    tensors = stacks_of({GATE_UP: (3, 72, 64), DOWN: (3, 64, 36)})
    tensors[DOWN][1, 3, 5] = torch.inf
    base = folders.write(tmp_path / "base", tensors)
    given = stack_factors(NESTED)
    folder = write_adapter(tmp_path / "adapter", given, **STACKS)
    with pytest.raises(DataError, match=r"down_proj: base holds NaN or Inf"):
        extrapolate(base, folder, tmp_path / "out")
    extrapolate(base, folder, tmp_path / "out", options=Options(on_nonfinite="copy"), overwrite=True)
    expected = (tensors[DOWN].double() + stacked_change(given, "experts", 3)).float().bfloat16()
    assert agreeing(written(tmp_path / "out")[DOWN], expected) >= SHARE
    assert all(one.ok for one in compare_all(choose_sample(tmp_path / "out", base, folder, count=40)))


def test_an_adapter_in_a_pickle_or_named_by_its_file_is_the_same(pair, tmp_path):
    base, adapter, out = pair
    extrapolate(base, adapter, out)
    extrapolate(base, adapter / "adapter_model.safetensors", tmp_path / "by file")
    pickled = write_adapter(tmp_path / "pickled", {})
    (pickled / "adapter_model.safetensors").unlink()
    torch.save(factors(Q, 80, 64), pickled / "adapter_model.bin")
    extrapolate(base, pickled, tmp_path / "of pickle")
    for other in ("by file", "of pickle"):
        assert (tmp_path / other / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_whole_model_beside_an_adapters_config_is_the_model(pair, tmp_path):
    base, adapter, _ = pair
    assert is_adapter(adapter)
    (base / "adapter_config.json").write_text("{}")
    assert not is_adapter(base)
    assert not is_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_parameters": "experts.down_proj"}, "expected [name, ...]"),
        ({"target_parameters": [3]}, "expected [name, ...]"),
        ({"target_parameters": ["down_proj"], "target_modules": ".*q_proj"}, "'down_proj' without its module"),
        (
            {"target_parameters": ["q_proj.a", "q_proj.b"]},
            "q_proj: has 1 pairs of factors, target_parameters names a, b of it",
        ),
        ({"target_parameters": ["q_proj.other"]}, "q_proj.other"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_16"}, "which changes the base"),
        ({"init_lora_weights": "olora"}, "which changes the base"),
        ({"init_lora_weights": "of a year to come"}, "not known here"),
        ({"r": 4}, "its rank is 8"),
        ({"rank_pattern": {"q_proj": 9}}, "its rank is 8"),
        ({"lora_alpha": "much"}, "lora_alpha of 'much'"),
        ({"rank_pattern": [1]}, "expected {pattern: number}"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "two repetitions"),
        ({"alpha_pattern": {"(": 1}}, "regular expression"),
        ({"alpha_pattern": {"(?i)q_proj": 1}}, "regular expression"),
        ({"alpha_pattern": {"a{9999999999999}": 1}}, "regular expression"),
        ({"lora_alpha": 10**400}, "expected a number"),
        ({"lora_alpha": True}, "expected a number"),
    ],
)
def test_what_is_more_than_factors_is_refused_by_name(config, says, pair):
    base, adapter, _ = pair
    write_adapter(adapter, factors(Q, 80, 64), **config)
    assert says in problems_of(base, adapter)


ODD = (
    None,
    True,
    -1,
    8.0,
    1e308,
    10**400,
    "",
    "\x1b[31m",
    [],
    [1],
    {},
    {"q_proj": None},
    {"[[a]": 1},
    {"a**": 1},
    {"": 8},
)
KEYS = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "fan_in_fan_out")
NAMES = (
    "{}.lora_A.weight",
    "{}.lora_B.two.weight",
    "{}.lora_embedding_A",
    ".lora_A.weight",
    "{}.base_layer.weight",
    "\x1b",
)
SHAPES = ((8, 64), (80, 8), (8,), (), (0, 64), (80, 0), (8, 1, 1), (80, 8, 1, 1))


@pytest.mark.parametrize("seed", range(150))
def test_whatever_an_adapter_holds_is_planned_or_refused_in_words(seed, pair):
    base, adapter, _ = pair
    chance = random.Random(seed)
    given = factors(Q, 80, 64)
    for _ in range(chance.randint(0, 2)):
        given[chance.choice(NAMES).format(Q.removesuffix(".weight"))] = torch.ones(chance.choice(SHAPES))
    config = {chance.choice(KEYS): chance.choice(ODD) for _ in range(chance.randint(0, 2))}
    write_adapter(adapter, given, **config)
    for look in (inspect_checkpoint, lambda adapter: plan_summary(plan(base, adapter))):
        said = ""
        try:
            look(adapter)
        except CheckpointError as refused:
            said = str(refused)
        assert "\x1b" not in said


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_how_factors_began_does_not_matter_where_base_stayed(start, pair):
    base, adapter, _ = pair
    plan(base, write_adapter(adapter, factors(Q, 80, 64), init_lora_weights=start))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (factors("model.layers.7.self_attn.q_proj", 80, 64), "base lacks: model.layers.7.self_attn.q_proj.weight"),
        (factors(Q, 80, 32), "base is (80, 64), the adapter's factors are (80, 8) and (8, 32)"),
        (dict(list(factors(Q, 80, 64).items())[:1]), "its other factor is missing"),
        ({"base_model.model.score.weight": normal(2, 2)}, "no factors in it"),
        (factors(Q, 80, 64) | {"base_model.model.x.lora_B.bias": normal(4)}, "tensors beside its factors"),
        (factors(Q, 80, 64) | {f"base_model.model.{EMBED}": normal(96, 64)}, "tensors beside its factors"),
        ({name: t.to(torch.int8) for name, t in factors(Q, 80, 64).items()}, "its factors are I8 and I8"),
        (factors(Q, 80, 64) | {k.replace("weight", "two.weight"): t for k, t in factors(Q, 80, 64).items()}, "twice"),
        (factors(Q, 80, 64) | factors("model." + Q, 80, 64), "both change"),
    ],
)
def test_factors_that_would_be_lost_or_do_not_fit_are_refused_by_name(given, says, pair):
    base, adapter, _ = pair
    assert says in problems_of(base, write_adapter(adapter, given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_of_bases_embedding_beside_the_factors_is_passed_over(dtype, pair):
    base, adapter, _ = pair
    copy = base_tensors()[EMBED].to(dtype)
    for name in (f"base_model.model.{EMBED}", "base_model.model.model.embed_tokens.base_layer.weight"):
        plan(base, write_adapter(adapter, factors(Q, 80, 64) | {name: copy}))
        other = copy.clone()
        other[-1, -1] += 1
        assert name in problems_of(base, write_adapter(adapter, factors(Q, 80, 64) | {name: other}))


def test_a_quantised_base_is_refused(pair):
    _, adapter, out = pair
    small = {Q: torch.zeros(80, 64).to(torch.float8_e4m3fn)}
    assert "dtype of base is F8_E4M3" in problems_of(folders.write(out.parent / "small", small), adapter)
    scaled = small | {Q.replace("weight", "weight_scale_inv"): torch.ones(1, 1)}
    assert "1 weights are of FP8" in problems_of(folders.write(out.parent / "scaled", scaled), adapter)
    packed = {Q: torch.zeros(80, 64).to(torch.uint8), Q.replace("weight", "weight.absmax"): torch.ones(80)}
    assert "base: quantised tensors" in problems_of(folders.write(out.parent / "packed", packed), adapter)


def test_fused_parts_are_not_split(tmp_path):
    name = "model.layers.0.mlp.gate_up_proj.weight"
    base = folders.write(tmp_path / "base", {name: normal(96, 32)}, model_type="phi3", intermediate_size=48)
    adapter = write_adapter(tmp_path / "adapter", factors(name, 96, 32))
    assert "as one matrix" in problems_of(base, adapter, split_fused=True)
    plan(base, adapter)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_another_dtype_is_rounded_to_once(dtype, pair, tmp_path):
    base = folders.write(tmp_path / "wide", base_tensors(torch.float32 if dtype == "bfloat16" else torch.bfloat16))
    extrapolate(base, pair[1], pair[2], options=Options(3, dtype=dtype))
    w0, out = load_file(base / "model.safetensors")[Q].double(), written(pair[2])[Q]
    assert out.dtype == getattr(torch, dtype)
    total = exactly.extrapolated(w0 + product(factors(Q, 80, 64), 2.0), w0, 3, 1.25)
    if dtype == "bfloat16":
        assert agreeing(out, rounded_once(total, torch.bfloat16)) >= SHARE
    assert float((out.double() - total).abs().max()) <= 4 * torch.finfo(out.dtype).eps * float(total.abs().max())
    assert all(one.ok for one in compare_all(choose_sample(pair[2], base, pair[1], count=9)))


def test_an_adapter_is_no_base_and_needs_its_config(pair):
    base, adapter, _ = pair
    assert "Give it as --aligned" in problems_of(adapter, base)
    (adapter / "adapter_config.json").unlink()
    assert "adapter_config.json: no such file" in problems_of(base, adapter)


@pytest.fixture
def tied(tmp_path):
    base = folders.write(tmp_path / "tied", base_tensors() | {HEAD: base_tensors()[EMBED]}, tie_word_embeddings=True)
    at = "base_model.model.model.embed_tokens.lora_embedding_"
    return base, {f"{at}A": normal(8, 96, scale=0.1), f"{at}B": normal(64, 8, scale=0.1)}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_tied_names_get_the_same_bytes(rounding, tied, tmp_path):
    base, given = tied
    adapter = write_adapter(tmp_path / "adapter", given)
    made = plan(base, adapter)
    assert any("is tied to the head" in warning for warning in made.warnings)
    extrapolate(base, adapter, tmp_path / "out", options=Options(rounding=rounding))
    out = written(tmp_path / "out")
    assert torch.equal(out[HEAD], out[EMBED])
    assert not torch.equal(out[HEAD], base_tensors()[EMBED])
    assert "one tied weight" in problems_of(base, adapter, skip=(HEAD,))


def test_a_tied_head_is_not_changed_by_itself(tied, tmp_path):
    base, given = tied
    for more in ({}, given):
        adapter = write_adapter(tmp_path / "adapter", factors(HEAD, 96, 64) | more)
        assert f"{HEAD}: is tied to {EMBED}" in problems_of(base, adapter)
    alone = folders.write(tmp_path / "alone", base_tensors(), tie_word_embeddings=True)
    assert "tied heads" in problems_of(alone, write_adapter(tmp_path / "adapter", factors(HEAD, 96, 64)))


def test_a_stopped_run_goes_on_to_the_same_bytes(pair, tmp_path):
    base, adapter, out = pair
    extrapolate(base, adapter, out)
    stop = threading.Event()
    with pytest.raises(Cancelled):
        extrapolate(base, adapter, tmp_path / "cut", cancel=stop, progress=lambda p: stop.set())
    extrapolate(base, adapter, tmp_path / "cut", resume=True)
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("change", ["weights", "config"])
def test_a_run_does_not_go_on_with_another_adapter(change, pair):
    base, adapter, out = pair
    stop = threading.Event()
    with pytest.raises(Cancelled):
        extrapolate(base, adapter, out, cancel=stop, progress=lambda p: stop.set())
    if change == "weights":
        write_adapter(adapter, factors(Q, 80, 64, seed=20))
    else:
        write_adapter(adapter, factors(Q, 80, 64), lora_alpha=17)
    with pytest.raises(ResumeError, match=r"adapter_(model|config)"):
        extrapolate(base, adapter, out, resume=True)


def test_a_damaged_output_is_repaired(pair):
    base, adapter, out = pair
    extrapolate(base, adapter, out)
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9000] + b"\xff" + whole[-8999:])
    extrapolate(base, adapter, out, resume=True, repair=True)
    assert weights.read_bytes() == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_knows_what_was_merged_and_no_more(dtype, pair):
    _, adapter, out = pair
    tensors = {name: tensor.to(dtype) for name, tensor in base_tensors().items()}
    tensors[Q][3, 5:7] = torch.tensor([torch.nan, torch.inf])
    base = folders.write(out.parent / "no numbers", tensors)
    summary = extrapolate(base, adapter, out, options=Options(on_nonfinite="copy"))
    assert any(f"{Q}: merged and not extrapolated" in warning for warning in summary.warnings)

    def compared():
        return {one.name: one for one in compare_all(choose_sample(out, base, adapter, count=9))}[Q]

    assert (compared().kind, compared().ok) == ("merged", True)
    right = written(out)
    for wrong in ((3, 5, 1.0), (3, 6, 1.0), None):
        changed = {name: tensor.clone() for name, tensor in right.items()}
        if wrong is None:
            changed[Q] = tensors[Q].clone()  # base without the adapter's change
        else:
            changed[Q][wrong[0], wrong[1]] = wrong[2]
        save_file(changed, out / "model.safetensors")
        assert not compared().ok


@pytest.mark.parametrize("skip", [(), ("*q_proj*",)])
def test_verify_recomputes_it_from_the_adapter(skip, pair):
    base, adapter, out = pair
    extrapolate(base, adapter, out, options=Options(3, skip=skip))
    seen = {one.name: one for one in compare_all(choose_sample(out, base, adapter, count=9))}
    assert all(one.ok for one in seen.values())
    assert (seen[Q].kind, seen[Q].share >= SHARE) == ("merged" if skip else "rank-k", True)
    weights = out / "model.safetensors"
    tensors = written(out)
    tensors[Q] = base_tensors()[Q]
    save_file(tensors, weights)
    assert not {one.name: one for one in compare_all(choose_sample(out, base, adapter, count=9))}[Q].ok
    write_adapter(adapter, factors(Q, 80, 64), lora_alpha=17)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        choose_sample(out, base, adapter)


def test_bits_depend_on_neither_threads_nor_the_way_they_leave(pair, tmp_path):
    base, adapter, out = pair
    extrapolate(base, adapter, out, options=Options(threads=1))
    extrapolate(base, adapter, tmp_path / "three", options=Options(threads=3, memory_bytes=1 << 28))
    assert (tmp_path / "three" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    for name, tensor in stream(base, adapter):
        assert torch.equal(tensor, written(out)[name])


def test_stochastic_rounding_keeps_the_update_on_average(pair):
    base, adapter, out = pair
    tiny = {name: tensor * 0.03 for name, tensor in factors(Q, 80, 64).items()}
    write_adapter(adapter, tiny)
    kept = {}
    for rounding in ("nearest", "stochastic"):
        folder = out / rounding
        kept[rounding] = extrapolate(base, adapter, folder, options=Options(rounding=rounding)).totals.retention
        w0 = base_tensors()[Q].double()
        added = exactly.extrapolated(w0 + product(tiny, 2.0), w0, 6, 1.25) - w0
        done = written(folder)[Q].double() - w0
        assert kept[rounding] == pytest.approx(float((done * added).sum() / added.square().sum()), abs=1e-3)
    assert kept["nearest"] < 0.7
    assert kept["stochastic"] == pytest.approx(1, abs=0.2)


def test_the_facts_are_those_of_the_change(pair):
    base, adapter, out = pair
    extrapolate(base, adapter, out, options=Options(3))
    manifest = json.loads((out / "lox_stream.json").read_text())
    (facts,) = manifest["tensors"][Q]["matrices"]
    delta = product(factors(Q, 80, 64), 2.0)
    s = torch.linalg.svdvals(delta)
    assert facts["method"] == "factors"
    assert facts["singular_values"] == pytest.approx(s[:3].tolist(), rel=1e-12)
    assert facts["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-12)
    assert facts["energy"] == pytest.approx(float(s[:3].square().sum() / s.square().sum()), rel=1e-12)
    assert facts["gap"] == pytest.approx(float((s[2] - s[3]) / s[2]), rel=1e-9)
    w0 = base_tensors()[Q].double()
    assert facts["weight_norm"] == pytest.approx(float((w0 + delta).norm()), rel=1e-2)
    added = exactly.extrapolated(w0 + delta, w0, 3, 1.25) - w0
    assert facts["update_norm"] == pytest.approx(float(added.norm()), rel=1e-9)
    assert set(manifest["inputs"]["aligned"]["shards"]) == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_untrained_adapter_changes_nothing(pair):
    base, adapter, out = pair
    given = factors(Q, 80, 64)
    given[next(name for name in given if "lora_B" in name)].zero_()
    summary = extrapolate(base, write_adapter(adapter, given), out)
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert (summary.totals.extrapolated, summary.totals.merged, summary.totals.identical) == (0, 1, 0)
    assert any("the adapter changes nothing" in warning for warning in summary.warnings)


def test_an_alpha_of_minus_one_at_full_rank_is_base(pair):
    base, adapter, out = pair
    extrapolate(base, adapter, out, options=Options(0, alpha=-1))
    assert torch.equal(written(out)[Q], base_tensors()[Q])


def test_factors_that_are_not_finite_are_an_error_and_weights_may_be_left(pair):
    base, adapter, out = pair
    tensors = base_tensors()
    tensors[Q][3, 5] = torch.inf
    base = folders.write(out.parent / "infinite", tensors)
    with pytest.raises(DataError, match="base holds NaN or Inf"):
        extrapolate(base, adapter, out)
    extrapolate(base, adapter, out, options=Options(skip=(Q,)), overwrite=True)
    merged = written(out)[Q]
    extrapolate(base, adapter, out, options=Options(on_nonfinite="copy"), overwrite=True)
    assert torch.equal(written(out)[Q], merged), "what the message says, either way"
    assert json.loads((out / "lox_stream.json").read_text())["tensors"][Q]["reason"] == "not finite"
    delta = product(factors(Q, 80, 64), 2.0)
    assert agreeing(written(out)[Q], (tensors[Q].double() + delta).float().bfloat16()) >= SHARE
    given = factors(Q, 80, 64)
    given[next(iter(given))][1, 2] = torch.nan
    for options in (Options(), Options(on_nonfinite="copy")):
        with pytest.raises(DataError, match=r"lora_A\.weight holds NaN or Inf"):
            extrapolate(base, write_adapter(adapter, given), out, options=options, overwrite=True)


def test_the_output_is_a_whole_model_with_the_adapters_tokenizer(pair):
    base, adapter, out = pair
    for folder in (base, adapter):
        for name in ("tokenizer.json", "README.md", "chat_template.jinja", "generation_config.json", "LICENSE"):
            (folder / name).write_text(f"{folder.name}: {name}")
    (base / "chat_template.jinja").unlink()
    extrapolate(base, adapter, out)
    assert (out / "tokenizer.json").read_text() == "adapter: tokenizer.json"
    assert (out / "chat_template.jinja").read_text() == "adapter: chat_template.jinja"
    assert (out / "generation_config.json").read_text() == "adapter: generation_config.json"
    assert (out / "LICENSE").read_text() == "base: LICENSE"
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not (out / "adapter_config.json").exists()
    card = (out / "README.md").read_text()
    assert "README.md" not in card
    assert "| SVD | of the adapter's factors |" in card
    assert "- adapter\n- base\n" in card


def test_shards_and_index_are_bases(pair, tmp_path):
    _, adapter, out = pair
    names, base = list(base_tensors()), tmp_path / "sharded"
    base.mkdir()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({name: base_tensors()[name] for name in names if where[name] == shard}, base / shard)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    extrapolate(base, adapter, out)
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"] == where


def test_a_plan_says_what_it_costs_and_a_recipe_counts(pair):
    base, adapter, _ = pair
    made = plan(base, adapter)
    (row,) = [row for row in plan_summary(made)["steps"] if row["action"] == "extrapolate"]
    assert row["factors"] == {"rank": 8, "scaling": 2.0}
    assert row["base_name"] == Q
    assert 0 < row["memory_bytes"] < 1 << 20
    away = plan(base, adapter, options=Options(device="cuda"))
    assert [card_memory_needed(step, "randomized") for step in away.steps] == [0] * 4, "the CPU computes it"
    with pytest.raises(MemoryBudgetError, match="--memory"):
        plan(base, adapter, options=Options(memory_bytes=1000))
    with pytest.raises(OptionError, match="no tensor"):
        plan(base, adapter, options=Options(skip=("*k_proj*",)))
    with pytest.raises(OptionError, match="no output folder"):
        execute(made)


def test_inspect_shows_the_factors(pair):
    seen = inspect_checkpoint(pair[1])
    (row,) = seen.rows
    assert (row.name, row.shape, row.reason) == (Q, (80, 64), "LoRA, rank 8, scaling 2")
    assert row.n_bytes == 4 * 8 * (80 + 64)


def test_the_command_line_takes_it(pair):
    base, adapter, out = map(str, pair)
    both = ["--base", base, "--aligned", adapter]
    dry = CliRunner().invoke(commands, ["run", *both, "--out", out, "--dry-run", "--assume", "disk=1GB/s,cores=2"])
    assert dry.exit_code == 0, dry.output
    assert "LoRA of rank 8 on 1 tensor" in dry.output
    assert CliRunner().invoke(commands, ["run", *both, "--out", out]).exit_code == 0
    assert CliRunner().invoke(commands, ["verify", out, *both]).exit_code == 0
    bench = CliRunner().invoke(commands, ["bench", *both])
    assert bench.exit_code == 2
