"""Laws of pairing: which tensor of base belongs to which of aligned, what is extrapolated, what is refused and how."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from lox_stream.checkpoint import DTYPE_BITS, Checkpoint, open_checkpoint
from lox_stream.matching import Step, glob_problems, match
from lox_stream.options import Options
from lox_stream.quantisation import quantisation_method, quantised_tensors
from lox_stream.ties import says_tied, tied_names

Tensors = dict[str, tuple[list[int], str]]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save(path: Path, tensors: Tensors) -> None:
    """A file of zeros."""
    header, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        n_bytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


@pytest.fixture
def opened(tmp_path):
    """opened(side, tensors, **config) -> Checkpoint"""

    def make(side: str, tensors: Tensors, **config: object) -> Checkpoint:
        save(tmp_path / side / "model.safetensors", tensors)
        (tmp_path / side / "config.json").write_text(json.dumps(config))
        return open_checkpoint(tmp_path / side)

    return make


def by_name(base: Checkpoint, aligned: Checkpoint, options: Options | None = None) -> dict[str, Step]:
    steps, problems, _ = match(base, aligned, options or Options())
    assert problems == []
    return {step.name: step for step in steps}


def problems_of(base: Checkpoint, aligned: Checkpoint, options: Options | None = None) -> list[str]:
    return match(base, aligned, options or Options())[1]


# What happens to a tensor


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ([4, 3], "F32", "matrix"),
        ([4, 3], "F64", "matrix"),
        ([4, 3], "F16", "matrix"),
        ([4, 3], "BF16", "matrix"),
        ([1, 1], "BF16", "matrix"),
        ([4], "BF16", "vector"),
        ([], "F32", "vector"),
        ([4, 3], "I64", "integer"),
        ([4, 3], "BOOL", "integer"),
        ([4], "U8", "integer"),
        ([0, 3], "F32", "empty"),
        ([0], "I64", "empty"),
    ],
)
def test_floats_of_two_dimensions_or_more_are_extrapolated_and_all_else_is_copied(opened, shape, dtype, reason):
    step = by_name(opened("base", {"a": (shape, dtype)}), opened("aligned", {"a": (shape, dtype)}))["a"]
    assert step.reason == reason
    assert step.action == ("extrapolate" if reason == "matrix" else "copy")
    assert (step.base is not None) == (reason == "matrix")


@pytest.mark.parametrize(
    ("shape", "stack"), [((7, 5), (1, 7, 5)), ((2, 7, 50), (2, 7, 50)), ((6, 3, 2, 2), (1, 6, 12))]
)
def test_more_dimensions_are_stacks_or_one_flat_matrix(opened, shape, stack):
    tensors = {"a": (list(shape), "F32")}
    step = by_name(opened("base", tensors), opened("aligned", tensors), Options(rank=3))["a"]
    assert (step.count, step.m, step.n, step.rank) == (*stack, 3)


def test_the_sides_may_differ_in_dtype_in_sharding_and_in_what_only_base_has(opened, tmp_path):
    aligned = opened("aligned", {"a": ([2, 3], "BF16"), "b": ([3, 2], "F32")})
    save(tmp_path / "base" / "s1.safetensors", {"b": ([3, 2], "F16"), "only.base": ([9, 9], "F32")})
    save(tmp_path / "base" / "s2.safetensors", {"a": ([2, 3], "F64")})
    weight_map = {"b": "s1.safetensors", "only.base": "s1.safetensors", "a": "s2.safetensors"}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    base = open_checkpoint(tmp_path / "base")
    steps, problems, warnings = match(base, aligned, Options())
    assert problems == []
    assert [(step.name, step.base) for step in steps] == [("a", base.tensors["a"]), ("b", base.tensors["b"])]
    assert any("only.base" in warning for warning in warnings)


def test_steps_follow_the_bytes_of_aligned(opened, tmp_path):
    save(tmp_path / "aligned" / "model-00001-of-00002.safetensors", {"z": ([2, 2], "F32"), "c": ([2, 2], "F32")})
    save(tmp_path / "aligned" / "model-00002-of-00002.safetensors", {"a": ([2, 2], "F32")})
    weight_map = {name: f"model-0000{1 + (name == 'a')}-of-00002.safetensors" for name in "acz"}
    (tmp_path / "aligned" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    base = opened("base", {name: ([2, 2], "F32") for name in "acz"})
    assert list(by_name(base, open_checkpoint(tmp_path / "aligned"))) == ["z", "c", "a"]


@pytest.mark.parametrize(
    ("skip", "only", "changed"),
    [
        ((), (), {"x.a", "x.b", "y.a"}),
        (("x.*",), (), {"y.a"}),
        ((), ("x.*",), {"x.a", "x.b"}),
        (("*.b",), ("x.*",), {"x.a"}),
        (("x.a", "x.b"), (), {"y.a"}),
    ],
)
def test_skip_and_only_choose_what_is_changed(opened, skip, only, changed):
    tensors: Tensors = {name: ([2, 2], "F32") for name in ("x.a", "x.b", "y.a")}
    steps = by_name(opened("base", tensors), opened("aligned", tensors), Options(skip=skip, only=only))
    assert {name for name, step in steps.items() if step.action == "extrapolate"} == changed
    assert {step.reason for step in steps.values() if step.action == "copy"} <= {"skipped"}


def test_alpha_zero_copies_everything_and_needs_nothing_of_base(opened):
    base, aligned = opened("base", {"z": ([2], "F32")}), opened("aligned", {"a": ([2, 2], "F8_E4M3"), "i": ([2], "I8")})
    steps = by_name(base, aligned, Options(alpha=0.0))
    assert {step.reason for step in steps.values()} == {"alpha 0"}
    said_quantised = opened("said", {"a": ([2, 2], "F16")}, quantization_config={"quant_method": "fp8"})
    assert problems_of(base, said_quantised, Options(alpha=0.0)) == []


def test_a_negative_alpha_and_nothing_to_change_are_noticed(opened):
    tensors: Tensors = {"a": ([2, 2], "F32")}
    sides = opened("base", tensors), opened("aligned", tensors)
    assert any("negative" in warning for warning in match(*sides, Options(alpha=-0.5))[2])
    assert any("no tensor is extrapolated" in warning for warning in match(*sides, Options(skip=("a",)))[2])
    assert match(*sides, Options())[2] == []


# What does not fit


def test_shapes_that_differ_name_both_and_the_way_out(opened):
    aligned = opened("aligned", {HEAD: ([32, 4], "F32"), "a": ([2, 2], "F32")})
    (problem,) = problems_of(opened("base", {HEAD: ([31, 4], "F32"), "a": ([2, 2], "F32")}), aligned)
    assert "lm_head.weight: aligned is (32, 4), base is (31, 4)" in problem
    assert "--skip 'lm_head.weight'" in problem
    base = opened("base", {HEAD: ([31, 4], "F32"), "a": ([2, 2], "F32")})
    assert problems_of(base, aligned, Options(skip=(HEAD,))) == []


def test_very_many_shapes_that_differ_are_counted_and_not_all_listed(opened):
    aligned = opened("aligned", {f"layers.{i}.w": ([2, 2], "F32") for i in range(50)})
    problems = problems_of(opened("base", {f"layers.{i}.w": ([3, 2], "F32") for i in range(50)}), aligned)
    assert len(problems) == 13
    assert "38 more tensors" in problems[-1]


def test_vectors_that_differ_do_not_matter_since_they_are_copied(opened):
    aligned = opened("aligned", {"v": ([3], "F32"), "own": ([3], "F32"), "a": ([2, 2], "F32")})
    assert problems_of(opened("base", {"v": ([4], "F32"), "a": ([2, 2], "F32")}), aligned) == []


def test_tensors_missing_in_base_are_one_message_with_globs(opened):
    names = [f"model.layers.{i}.mlp.weight" for i in range(40)]
    aligned = opened("aligned", {name: ([2, 2], "F32") for name in names})
    base = opened("base", {name.replace("model.", "net."): ([2, 2], "F32") for name in names})
    (problem,) = problems_of(base, aligned)
    assert "40 tensors of aligned missing in base" in problem
    assert "model.layers.0.mlp.weight" in problem
    assert "base has 'net.layers.*.mlp.weight'" in problem
    assert "--rename" in problem
    assert "--on-missing copy" in problem
    assert "--skip 'model.layers.*.mlp.weight'" in problem
    assert problems_of(base, aligned, Options(skip=("model.layers.*.mlp.weight",))) == []


@pytest.mark.parametrize(("key", "one", "two"), [("architectures", ["A"], ["B"]), ("model_type", "a", "b")])
def test_architectures_that_differ_are_refused(opened, key, one, two):
    tensors: Tensors = {"a": ([2, 2], "F32")}
    (problem,) = problems_of(opened("base", tensors, **{key: one}), opened("aligned", tensors, **{key: two}))
    assert str(one) in problem
    assert str(two) in problem
    assert "fine-tuned from" in problem
    assert problems_of(opened("base", tensors, **{key: one}), opened("aligned", tensors)) == []


@pytest.mark.parametrize(("base_dtype", "aligned_dtype", "side"), [("F32", "C64", "aligned"), ("I32", "F32", "base")])
def test_a_dtype_that_cannot_be_computed_with_is_refused(opened, base_dtype, aligned_dtype, side):
    sides = opened("base", {"x.0.a": ([2, 2], base_dtype)}), opened("aligned", {"x.0.a": ([2, 2], aligned_dtype)})
    (problem,) = problems_of(*sides)
    assert f"dtype of {side} is" in problem
    assert "--skip 'x.*.a'" in problem


def test_all_problems_of_a_pair_come_at_once(opened):
    aligned = opened("aligned", {"s": ([2, 2], "F32"), "m": ([2, 2], "F32"), "q": ([2, 2], "F8_E4M3")}, model_type="a")
    problems = problems_of(opened("base", {"s": ([2, 3], "F32"), "q": ([2, 2], "BF16")}, model_type="b"), aligned)
    assert len(problems) == 4
    for word in ("model_type", "F8_E4M3", "missing in base", "(2, 3)"):
        assert sum(word in problem for problem in problems) == 1


def test_a_glob_that_matches_nothing_names_what_was_meant(opened):
    aligned = opened("aligned", {"model.layers.0.self_attn.q_proj.weight": ([2, 2], "F32"), "b": ([2], "F32")})
    skip, only = glob_problems(aligned, Options(skip=("*q_porj*", "b"), only=("*.Q_PROJ.*",)))
    assert "--skip '*q_porj*' matches no tensor" in skip
    assert "'model.layers.*.self_attn.q_proj.weight'" in skip
    assert "--only" in only


# Tied weights


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {}, {"text_config": {"tie_word_embeddings": True}}])
def test_a_head_that_base_ties_is_paired_with_its_embedding(opened, config):
    aligned = opened("aligned", {EMBED: ([9, 4], "F32"), HEAD: ([9, 4], "F32")}, tie_word_embeddings=False)
    base = opened("base", {EMBED: ([9, 4], "F32"), "other.weight": ([9, 4], "F32")}, **config)
    steps = by_name(base, aligned)
    assert steps[HEAD].base == steps[EMBED].base == base.tensors[EMBED]
    assert steps[HEAD].seed_name == HEAD


def test_a_head_is_missing_when_base_says_that_it_has_its_own(opened):
    aligned = opened("aligned", {EMBED: ([9, 4], "F32"), HEAD: ([9, 4], "F32")})
    (problem,) = problems_of(opened("base", {EMBED: ([9, 4], "F32")}, tie_word_embeddings=False), aligned)
    assert "missing in base: lm_head.weight" in problem


@pytest.mark.parametrize(
    ("name", "base_name"),
    [
        (HEAD, "transformer.wte.weight"),
        ("transformer.wte.weight", HEAD),
        (HEAD, "shared.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("shared.weight", "encoder.embed_tokens.weight"),
        ("model.language_model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("embed_out.weight", "gpt_neox.embed_in.weight"),
    ],
)
def test_a_tied_weight_is_found_under_its_other_name(opened, name, base_name):
    base, aligned = opened("base", {base_name: ([9, 4], "F32")}), opened("aligned", {name: ([9, 4], "F32")})
    assert by_name(base, aligned)[name].base == base.tensors[base_name]


def test_an_embedding_of_another_shape_is_no_partner(opened):
    (problem,) = problems_of(opened("base", {EMBED: ([8, 4], "F32")}), opened("aligned", {HEAD: ([9, 4], "F32")}))
    assert "missing in base" in problem


def test_embeddings_are_tied_whatever_the_config_says_of_the_head(opened):
    base = opened("base", {"shared.weight": ([9, 4], "F32"), HEAD: ([9, 4], "F32")}, tie_word_embeddings=False)
    aligned = opened("aligned", {"encoder.embed_tokens.weight": ([9, 4], "F32"), HEAD: ([9, 4], "F32")})
    steps = by_name(base, aligned)
    assert steps["encoder.embed_tokens.weight"].base == base.tensors["shared.weight"]
    assert steps[HEAD].base == base.tensors[HEAD]


def test_two_stored_names_of_one_tied_weight_are_computed_alike(opened):
    both: Tensors = {EMBED: ([9, 4], "F32"), HEAD: ([9, 4], "F32"), "a": ([9, 4], "F32")}
    aligned = opened("aligned", both, tie_word_embeddings=True)
    base = opened("base", both, tie_word_embeddings=False)
    steps = by_name(base, aligned)
    assert steps[HEAD].seed_name == steps[EMBED].seed_name == EMBED
    assert steps[HEAD].base == steps[EMBED].base == base.tensors[EMBED]
    assert steps["a"].seed_name == "a"


@pytest.mark.parametrize("options", [Options(skip=(HEAD,)), Options(only=("model.*",)), Options(skip=("*embed*",))])
def test_one_of_two_tied_names_alone_is_refused(opened, options):
    both: Tensors = {EMBED: ([9, 4], "F32"), HEAD: ([9, 4], "F32")}
    sides = opened("base", both), opened("aligned", both, tie_word_embeddings=True)
    (problem,) = problems_of(*sides, options)
    assert "one tied weight" in problem
    assert problems_of(*sides, Options(skip=(HEAD, EMBED))) == []


def test_a_glob_for_a_head_that_is_tied_is_explained(opened):
    aligned = opened("aligned", {EMBED: ([9, 4], "F32")}, tie_word_embeddings=True)
    (problem,) = glob_problems(aligned, Options(skip=(HEAD,)))
    assert "tied to the embedding" in problem


def test_ties_are_not_assumed_between_stored_names_without_the_config(opened):
    both: Tensors = {EMBED: ([9, 4], "F32"), HEAD: ([9, 4], "F32")}
    assert tied_names(opened("aligned", both)) == {}
    assert says_tied({}) is None
    t5: Tensors = {name: ([9, 4], "F32") for name in ("shared.weight", "encoder.embed_tokens.weight")}
    assert tied_names(opened("aligned", t5)) == {"encoder.embed_tokens.weight": "shared.weight"}


# Quantised weights


QUANTISED: dict[str, tuple[Tensors, set[str]]] = {
    "F8_E4M3": ({"x.weight": ([4, 4], "F8_E4M3"), "x.weight_scale_inv": ([3, 3], "F32")}, {"x.weight_scale_inv"}),
    "F4": ({"x.weight": ([4, 4], "F4")}, set()),
    "GPTQ": (
        {
            "x.qweight": ([4, 4], "I32"),
            "x.qzeros": ([1, 4], "I32"),
            "x.scales": ([1, 4], "F16"),
            "x.g_idx": ([4], "I32"),
        },
        {"x.qzeros", "x.scales"},
    ),
    "MXFP4": ({"x_blocks": ([2, 4, 16], "U8"), "x_scales": ([2, 4], "U8")}, {"x_scales"}),
    "compressed-tensors integers": (
        {"x.weight_packed": ([4, 4], "I32"), "x.weight_scale": ([4, 1], "BF16")},
        {"x.weight_scale"},
    ),
    "compressed-tensors NVFP4": (
        {
            "x.weight_packed": ([16, 16], "U8"),
            "x.weight_scale": ([16, 2], "F8_E4M3"),
            "x.weight_global_scale": ([1], "F32"),
        },
        {"x.weight_scale"},
    ),
    "compressed-tensors MXFP4": (
        {"x.weight_packed": ([16, 16], "U8"), "x.weight_scale": ([16, 1], "U8")},
        {"x.weight_scale"},
    ),
    "AWQ": (
        {"x.qweight": ([32, 4], "I32"), "x.qzeros": ([1, 4], "I32"), "x.scales": ([1, 32], "F16")},
        {"x.qzeros", "x.scales"},
    ),
    "NVFP4 of ModelOpt": (
        {
            "x.weight": ([16, 16], "U8"),
            "x.weight_scale": ([16, 2], "F8_E4M3"),
            "x.weight_scale_2": ([], "F32"),
            "x.input_scale": ([], "F32"),
        },
        {"x.weight_scale", "x.weight_scale_2"},
    ),
    "I8 with scales": ({"x.weight": ([4, 4], "I8"), "x.weight_scale": ([4, 1], "BF16")}, {"x.weight_scale"}),
    "U8 with scales": ({"x.weight": ([4, 4], "U8"), "x.weight_scale": ([4, 1], "F8_E4M3")}, {"x.weight_scale"}),
    "bitsandbytes": ({"x.weight": ([8, 1], "U8"), "x.weight.absmax": ([1, 2], "F32")}, {"x.weight.absmax"}),
    "quanto": ({"x.weight._data": ([4, 4], "I8"), "x.weight._scale": ([4, 1], "F16")}, {"x.weight._scale"}),
}


@pytest.mark.parametrize("scheme", QUANTISED)
def test_quantised_weights_are_refused_with_a_way_out_that_works(opened, scheme):
    tensors, scales = QUANTISED[scheme]
    plain: Tensors = {"plain.weight": ([4, 4], "F16")}
    aligned = opened("aligned", {**tensors, **plain}, quantization_config={"quant_method": "q"})
    assert scales <= quantised_tensors(aligned).keys()
    base = opened(
        "base", {name.replace("qweight", "weight"): (shape, "F16") for name, (shape, _) in tensors.items()} | plain
    )
    problems = problems_of(base, aligned)
    assert problems
    assert all("De-quantise" in problem for problem in problems)
    assert any(scheme in problem for problem in problems)
    globs = [part.strip("'") for problem in problems for part in problem.split("--skip ")[1:]]
    skip = tuple(glob.strip().strip("'") for glob in globs)
    assert problems_of(base, aligned, Options(skip=skip)) == []
    assert by_name(base, aligned, Options(skip=skip))["plain.weight"].action == "extrapolate"


@pytest.mark.parametrize(
    ("scheme", "way"),
    [
        ("GPTQ", r"gptqmodel\.utils\.model_dequant\.dequantize_model\(DIR, NEW\)"),
        ("AWQ", r"gptqmodel\.utils\.model_dequant\.dequantize_model\(DIR, NEW\)"),
        ("NVFP4 of ModelOpt", r"gptqmodel\.utils\.model_dequant\.dequantize_model\(DIR, NEW\)"),
        ("MXFP4", r"Mxfp4Config\(dequantize=True\)"),
        ("bitsandbytes", r"from_pretrained\(DIR\), then dequantize\(\) and save_pretrained"),
        ("compressed-tensors NVFP4", r"CompressedTensorsDequantizer\(DIR\)"),
        ("compressed-tensors MXFP4", r"CompressedTensorsDequantizer\(DIR\)"),
    ],
)
def test_each_scheme_has_one_problem_with_its_own_name_and_way_out(opened, scheme, way):
    aligned = opened("aligned", QUANTISED[scheme][0])
    problems = problems_of(opened("base", QUANTISED[scheme][0]), aligned)
    (problem,) = [problem for problem in problems if problem.startswith("aligned")]
    assert re.search(rf"quantised tensors \({scheme}\): .*De-quantise the checkpoint first \(.*{way}", problem)


@pytest.mark.parametrize(
    ("tensors", "config", "scheme"),
    [
        (QUANTISED["compressed-tensors integers"][0], {"num_bits": 4}, "int4"),
        (QUANTISED["compressed-tensors integers"][0], {"num_bits": 8}, "int8"),
        (QUANTISED["I8 with scales"][0], {"num_bits": 8}, "int8"),
        (QUANTISED["compressed-tensors integers"][0], {"num_bits": [4]}, "integers"),
    ],
)
def test_the_bits_of_compressed_tensors_are_told_by_the_config(opened, tensors, config, scheme):
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": config}}}
    found = quantised_tensors(opened("aligned", tensors, quantization_config=said))
    assert set(found.values()) == {f"compressed-tensors {scheme}"}


def test_a_quantised_base_is_refused_by_its_scheme(opened):
    aligned = opened("aligned", {"x.weight": ([4, 4], "F16")})
    base = opened("base", QUANTISED["GPTQ"][0])
    assert any(problem.startswith("base: quantised tensors (GPTQ)") for problem in problems_of(base, aligned))
    base = opened("base", {"x.weight": ([4, 4], "F8_E4M3")})
    (problem,) = problems_of(base, aligned)
    assert "base: quantised tensors (F8_E4M3 without a scale beside it)" in problem


def test_a_config_that_says_quantised_over_plain_tensors_is_refused(opened):
    tensors: Tensors = {"x.weight": ([4, 4], "F16")}
    config = {"quantization_config": {"quant_method": "fp8"}}
    (problem,) = problems_of(opened("base", tensors), opened("aligned", tensors, **config))
    assert "(fp8)" in problem
    assert "remove quantization_config" in problem
    assert quantisation_method({"text_config": config}) == "fp8"
    assert quantisation_method({"quantization_config": None}) is None


def test_integers_and_scales_of_no_quantiser_are_left_alone(opened):
    tensors: Tensors = {
        "position_ids": ([1, 8], "I64"),
        "logit_scale": ([], "F32"),
        "norm.num_batches_tracked": ([], "I64"),
        "mask": ([4, 4], "BOOL"),
        "mask_scale": ([4], "F32"),
        "a.weight": ([4, 4], "F32"),
        "a.weight_scale": ([4, 4], "F32"),
    }
    checkpoint = opened("aligned", tensors)
    assert quantised_tensors(checkpoint) == {}
    assert problems_of(opened("base", tensors), checkpoint) == []
