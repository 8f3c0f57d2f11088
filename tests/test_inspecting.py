"""Laws of looking at a checkpoint: what it says agrees with what a run would do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lox_stream.checkpoint import DTYPE_BITS
from lox_stream.errors import CheckpointError, OptionError
from lox_stream.inspecting import inspect_checkpoint, inspection_summary
from lox_stream.options import Options
from lox_stream.planning import plan

EMBED = "model.embed_tokens.weight"


def save(folder: Path, config: dict, tensors: dict[str, tuple[list[int], str]]) -> Path:
    """A checkpoint of zeros."""
    header, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        n_bytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def llama(layers: int = 3) -> dict[str, tuple[list[int], str]]:
    tensors = {EMBED: ([10, 4], "BF16"), "model.norm.weight": ([4], "F32"), "ids": ([2, 2], "I64")}
    for i in range(layers):
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = ([8, 4], "BF16")
    return tensors


def test_what_it_says_of_each_tensor_is_what_a_run_does(tmp_path):
    base, aligned = save(tmp_path / "base", {}, llama()), save(tmp_path / "aligned", {}, llama())
    options = Options(skip=("*.1.*",))
    seen = [(row.name, row.action, row.reason) for row in inspect_checkpoint(aligned, options).rows]
    assert seen == [(step.name, step.action, step.reason) for step in plan(base, aligned, options=options).steps]
    assert ("model.layers.1.mlp.up_proj.weight", "copy", "skipped") in seen


def test_layers_are_grouped_and_nothing_is_lost_in_the_sums(tmp_path):
    inspection = inspect_checkpoint(save(tmp_path / "m", {"architectures": ["LlamaForCausalLM"]}, llama()))
    group = next(group for group in inspection.groups if group.pattern == "model.layers.*.mlp.up_proj.weight")
    assert (group.count, group.shapes, group.n_bytes, group.actions) == (3, ((8, 4),), 192, ("extrapolate",))
    assert sum(group.count for group in inspection.groups) == len(inspection.rows) == 6
    for parts in (inspection.bytes_by_dtype, inspection.bytes_by_action):
        assert sum(parts.values()) == inspection.n_bytes == sum(group.n_bytes for group in inspection.groups)
    assert inspection.n_elements == 40 + 4 + 4 + 3 * 32
    assert inspection.architecture == "LlamaForCausalLM"
    assert inspection.companions == (Path("config.json"),)


@pytest.mark.parametrize(("config", "tied"), [({"tie_word_embeddings": True}, {"lm_head.weight": EMBED}), ({}, {})])
def test_a_head_that_is_not_stored_is_named_as_tied_where_the_config_says_so(tmp_path, config, tied):
    inspection = inspect_checkpoint(save(tmp_path / "m", config, llama()))
    assert inspection.tied == tied
    assert inspection.says_tied is config.get("tie_word_embeddings")


def test_quantised_and_unknown_weights_are_shown_as_refused_and_not_as_an_error(tmp_path):
    tensors = {"x.weight": ([4, 4], "F8_E4M3"), "x.weight_scale_inv": ([3, 3], "F32"), "c": ([2, 2], "C64")}
    config = {"quantization_config": {"quant_method": "fp8"}}
    inspection = inspect_checkpoint(save(tmp_path / "m", config, tensors))
    assert {row.name: (row.action, row.reason) for row in inspection.rows} == {
        "x.weight": ("refuse", "F8_E4M3"),
        "x.weight_scale_inv": ("refuse", "F8_E4M3"),
        "c": ("refuse", "C64"),
    }
    assert inspection.quantisation == {"F8_E4M3": 2}
    assert inspection.quantisation_method == "fp8"


def test_the_summary_is_json_with_the_same_facts(tmp_path):
    inspection = inspect_checkpoint(save(tmp_path / "m", {}, llama()))
    summary = json.loads(json.dumps(inspection_summary(inspection)))
    assert summary["path"] == str(tmp_path / "m")
    assert summary["rows"][0]["name"] == EMBED
    assert summary["rows"][0]["shape"] == [10, 4]
    assert summary["companions"] == ["config.json"]


def test_a_glob_that_matches_nothing_and_a_broken_checkpoint_are_errors(tmp_path):
    folder = save(tmp_path / "m", {}, llama())
    with pytest.raises(OptionError, match="up_proj"):
        inspect_checkpoint(folder, Options(only=("*up_porj*",)))
    with pytest.raises(CheckpointError, match="no such file"):
        inspect_checkpoint(tmp_path / "no")
