"""Which tensors belong together where the two sides call them differently, lack some, or have other shapes."""

from __future__ import annotations

import pytest
import torch
from exactly import extrapolated
from folders import write
from safetensors.torch import load_file

from lox_stream import Options, extrapolate, plan
from lox_stream.errors import CheckpointError, LoxError, OptionError
from lox_stream.options import rename_problem
from lox_stream.recomputing import compare_all
from lox_stream.sampling import choose_sample
from lox_stream.verifying import verify_checksums

GENERATOR = torch.Generator().manual_seed(3)


def weights(*shape):
    return torch.randn(*shape, generator=GENERATOR)


@pytest.fixture
def sides(tmp_path):
    """Makes base and aligned, and runs them."""

    def make(base, aligned, **config):
        return write(tmp_path / "base", base, **config), write(tmp_path / "aligned", aligned, **config)

    return make


def planned(sides, **options):
    made = plan(*sides, options=Options(**options))
    return {step.name: step for step in made.steps}, " ".join(made.warnings)


def partners(steps):
    return {name: step.base.name for name, step in steps.items() if step.base is not None}


NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("model.", ""), ("", "model."), ("language_model.model.", "model."), ("base_model.model.model.", "model.")],
)
def test_prefixes_of_wrappers_are_seen_through_and_it_is_said(sides, ours, theirs):
    names = [name.removeprefix("model.") for name in NAMES]
    steps, told = planned(sides({theirs + n: weights(8, 4) for n in names}, {ours + n: weights(8, 4) for n in names}))
    assert partners(steps) == {ours + name: theirs + name for name in names}
    assert "3 tensors paired with those of base under another prefix" in told or names[0] in told
    assert "--rename" in told


def test_a_head_under_a_wrapper_is_paired_with_the_head(sides):
    base = {"lm_head.weight": weights(8, 4), "model.embed_tokens.weight": weights(8, 4)}
    aligned = {f"language_model.{name}": weights(8, 4) for name in base}
    steps, _ = planned(sides(base, aligned))
    assert partners(steps) == {f"language_model.{name}": name for name in base}


def test_a_prefix_that_leaves_a_choice_pairs_nothing(sides):
    base = {"model.a.weight": weights(8, 4), "transformer.a.weight": weights(8, 4)}
    with pytest.raises(CheckpointError, match=r"1 tensor of aligned missing in base: a\.weight"):
        planned(sides(base, {"a.weight": weights(8, 4)}))


def test_a_prefix_does_not_pair_other_shapes(sides):
    with pytest.raises(CheckpointError, match="missing in base"):
        planned(sides({"a.weight": weights(8, 5)}, {"model.a.weight": weights(8, 4)}))


@pytest.mark.parametrize(
    ("rename", "theirs", "ours"),
    [
        (("net.*=model.*",), "net.h.0.w", "model.h.0.w"),
        (("*.h.*.w=*.layers.*.weight",), "net.h.0.w", "net.layers.0.weight"),
        (("h?.w=x?.w",), "h1.w", "x1.w"),
        (("a.b=c[0]",), "a.b", "c[0]"),
        (("a.*=b.*", "a.w=c.w"), "a.w", "b.w"),
    ],
)
def test_names_of_base_are_renamed_by_the_first_pattern_that_matches(sides, rename, theirs, ours):
    steps, told = planned(sides({theirs: weights(8, 4)}, {ours: weights(8, 4)}), rename=rename)
    assert partners(steps) == {ours: theirs}
    assert told == ""


def test_a_rename_may_swap_two_tensors(sides):
    tensors = {"a": weights(8, 4), "b": weights(8, 4)}
    steps, _ = planned(sides(tensors, tensors | {"a": weights(8, 4)}), rename=("a=b", "b=a"))
    assert partners(steps) == {"a": "b", "b": "a"}


def test_a_rename_that_matches_nothing_or_too_much_is_an_error(sides):
    pair = sides({"model.a": weights(8, 4), "model.b": weights(8, 4)}, {"x.a": weights(8, 4)})
    with pytest.raises(LoxError, match=r"--rename 'modle\.\*=x\.\*' matches no tensor of .*Did you mean 'model\.a'"):
        plan(*pair, options=Options(rename=("modle.*=x.*",)))
    with pytest.raises(LoxError, match=r"gives model\.a and model\.b of base the same name x\.a"):
        plan(*pair, options=Options(rename=("model.a=x.a", "model.b=x.a")))


def test_a_tie_does_not_bring_a_renamed_tensor_back(sides):
    names = ("model.embed_tokens.weight", "lm_head.weight")
    pair = sides(*({name: weights(8, 4) for name in names} for _ in range(2)), tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing in base: lm_head\.weight"):
        planned(pair, rename=("lm_head.*=foo.*",))
    assert partners(planned(pair, rename=("lm_head.*=foo.*",), on_missing="copy")[0]) == {names[0]: names[0]}


def test_a_vocabulary_that_grew_is_seen_through_a_wrapper(sides):
    base = {
        "model.embed_tokens.weight": weights(8, 4),
        "model.norm.weight": weights(4),
        "model.a.weight": weights(8, 4),
    }
    aligned = {f"language_model.{name}": weights(*t.shape) for name, t in base.items()}
    aligned["language_model.model.embed_tokens.weight"] = weights(9, 4)
    pair = sides(base, aligned)
    with pytest.raises(CheckpointError, match=r"aligned is \(9, 4\), base is \(8, 4\).*overlap"):
        planned(pair)
    steps, told = planned(pair, on_shape_mismatch="overlap")
    assert steps["language_model.model.embed_tokens.weight"].m == 8
    assert "not used" not in told, "the norm is aligned's own, under another prefix"


@pytest.mark.parametrize("rename", [(), ("model.*=language_model.model.*",)])
def test_what_wraps_a_model_may_have_another_architecture(tmp_path, rename):
    base = write(tmp_path / "base", {"model.a.weight": weights(8, 4)}, architectures=["LlamaForCausalLM"])
    tensors = {"language_model.model.a.weight": weights(8, 4)}
    aligned = write(tmp_path / "aligned", tensors, architectures=["LlavaForConditionalGeneration"])
    steps, told = planned((base, aligned), rename=rename)
    assert partners(steps) == {"language_model.model.a.weight": "model.a.weight"}
    assert "LlavaForConditionalGeneration" in told


@pytest.mark.parametrize("rename", ["", "a", "a=", "=b", "a.*=b", "a=b.*", "a.?=b"])
def test_a_rename_that_means_nothing_is_an_error(rename):
    with pytest.raises(OptionError, match="--rename"):
        plan("nowhere", "nowhere", options=Options(rename=(rename,)))


def test_what_base_lacks_is_copied_where_that_is_allowed(sides, tmp_path):
    base, aligned = {"a": weights(8, 4)}, {"a": weights(8, 4), "b": weights(8, 4)}
    pair = sides(base, aligned)
    with pytest.raises(CheckpointError, match="--on-missing copy"):
        planned(pair)
    extrapolate(*pair, tmp_path / "out", options=Options(rank=2, on_missing="copy"))
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["b"], aligned["b"])
    assert torch.allclose(out["a"].double(), extrapolated(aligned["a"], base["a"], 2, 1.25), atol=1e-5)
    assert planned(pair, on_missing="copy")[0]["b"].reason == "missing"


def test_other_shapes_are_copied_where_that_is_allowed(sides):
    pair = sides({"a": weights(8, 4), "b": weights(9, 5)}, {"a": weights(8, 4), "b": weights(9, 4)})
    with pytest.raises(CheckpointError, match="--on-shape-mismatch copy"):
        planned(pair)
    steps, _ = planned(pair, on_shape_mismatch="copy")
    assert (steps["b"].action, steps["b"].reason) == ("copy", "other shape")
    with pytest.raises(CheckpointError, match=r"b: aligned is \(9, 4\), base is \(9, 5\)"):
        planned(pair, on_shape_mismatch="overlap")  # other columns are no vocabulary that grew


@pytest.mark.parametrize(("ours", "theirs"), [(40, 32), (32, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_vocabulary_that_grew_the_common_rows_are_extrapolated(sides, tmp_path, ours, theirs, dtype):
    names = ("model.embed_tokens.weight", "lm_head.weight")
    base = {name: weights(theirs, 16).to(dtype) for name in names}
    aligned = {name: weights(ours, 16).to(dtype) for name in names}
    pair = sides(base, aligned, tie_word_embeddings=False)
    options = Options(rank=2, on_shape_mismatch="overlap")
    summary = extrapolate(*pair, tmp_path / "out", options=options)
    assert summary.totals.extrapolated == 2
    assert any("are copied, for base has 32" in warning for warning in summary.warnings) == (ours > theirs)
    out, rows = load_file(tmp_path / "out" / "model.safetensors"), min(ours, theirs)
    for name in names:
        right = extrapolated(aligned[name][:rows], base[name][:rows], 2, 1.25).to(dtype)
        assert torch.equal(out[name][rows:], aligned[name][rows:]), "new rows are copied"
        if dtype == torch.float32:
            assert torch.allclose(out[name][:rows], right, atol=1e-5)
        else:
            assert (out[name][:rows] != right).double().mean() < 0.01
    assert not torch.equal(out[names[0]][:rows], aligned[names[0]][:rows])
    assert all(check.ok for check in verify_checksums(tmp_path / "out"))
    assert [one.ok for one in compare_all(choose_sample(tmp_path / "out", *pair, count=2))] == [True, True]


def test_new_rows_that_are_no_numbers_are_copied_and_said(sides, tmp_path):
    name = "model.embed_tokens.weight"
    aligned = {name: weights(40, 16)}
    aligned[name][37, 3] = torch.nan
    pair = sides({name: weights(32, 16)}, aligned)
    summary = extrapolate(*pair, tmp_path / "out", options=Options(rank=2, on_shape_mismatch="overlap"))
    assert any("NaN or Inf in rows 32 to 39, which are copied as they are" in warning for warning in summary.warnings)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name][32:].isnan(), aligned[name][32:].isnan())


def test_tied_weights_that_grew_stay_tied(sides, tmp_path):
    table = weights(40, 16)
    base = {"model.embed_tokens.weight": weights(32, 16)}
    aligned = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    pair = sides(base, aligned, tie_word_embeddings=True)
    extrapolate(*pair, tmp_path / "out", options=Options(rank=2, on_shape_mismatch="overlap"))
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])
    assert not torch.equal(out["lm_head.weight"], table)


@pytest.mark.parametrize(
    ("option", "base_shape", "told"),
    [
        ("on_missing", None, "1 tensor not extrapolated, for base has none: b.weight"),
        ("on_shape_mismatch", (5, 4), "1 tensor not extrapolated, for base has another shape: b.weight"),
    ],
)
def test_what_is_copied_because_it_does_not_fit_is_told_by_name(tmp_path, option, base_shape, told):
    other = {} if base_shape is None else {"b.weight": torch.ones(base_shape)}
    base = write(tmp_path / "base", {"a.weight": torch.ones(4, 4), **other})
    aligned = write(tmp_path / "aligned", {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(6, 4)})
    assert told in plan(base, aligned, options=Options(**{option: "copy"})).warnings


def test_what_is_counted_once_is_not_told_in_the_plural():
    assert rename_problem("a.*=b").startswith("the pattern has 1 wildcard and")
    assert rename_problem("*.*=b").startswith("the pattern has 2 wildcards and")
