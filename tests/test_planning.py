"""Laws of the plan: everything wrong is said at once and in its own kind, nothing is written, the summary is JSON."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from lox_stream import costs, errors
from lox_stream.checkpoint import DTYPE_BITS
from lox_stream.planning import Options, memory_needed, output_names, plan, plan_summary

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


def save(path: Path, **tensors: tuple[list[int], str]) -> None:
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
def pair(tmp_path):
    """The folders of base and aligned: a matrix, a stack of two, a vector and an integer."""
    for side, dtype in (("base", "F32"), ("aligned", "BF16")):
        matrices = {"a": ([8, 6], dtype), "stack": ([2, 3, 32], dtype)}
        save(tmp_path / side / "model.safetensors", **matrices, v=([3], "F32"), i=([2], "I64"))
        (tmp_path / side / "config.json").write_text('{"architectures": ["X"]}')
    return tmp_path / "base", tmp_path / "aligned"


def test_a_plan_says_for_each_tensor_what_happens_and_why(pair, tmp_path):
    made = plan(*pair, tmp_path / "out", options=Options(rank=2))
    assert [(step.name, step.action, step.reason) for step in made.steps] == [
        ("a", "extrapolate", "matrix"),
        ("stack", "extrapolate", "matrix"),
        ("v", "copy", "vector"),
        ("i", "copy", "integer"),
    ]
    assert made.out == tmp_path / "out"
    assert made.warnings == ()
    assert not made.out.exists()
    assert set(output_names(made)) >= {"model.safetensors", "config.json", "lox_stream.json"}
    assert output_names(made) == output_names(made.aligned)


@pytest.mark.parametrize("side", ["base", "aligned"])
@pytest.mark.parametrize("ways", [{"overwrite": True}, {"resume": True}], ids=str)
def test_inputs_that_links_lead_to_are_never_touched(pair, tmp_path, side, ways):
    folder = pair[side == "aligned"]
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    given = (linked, pair[1]) if side == "base" else (pair[0], linked)
    with pytest.raises(errors.OutputError, match=rf"holds files of {side}, to which links lead: .*inputs are never"):
        plan(*given, folder, **ways)
    assert plan(*given, tmp_path / "out").out == tmp_path / "out"


def test_without_an_output_only_the_inputs_are_checked(pair):
    assert plan(str(pair[0]), str(pair[1])).out is None


def test_relative_paths_mean_the_folder_of_the_call(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = plan("base", "aligned", "out")
    assert (made.base.root, made.out) == (pair[0], tmp_path / "out")


def test_the_summary_is_json_and_its_totals_are_the_sums_of_its_steps(pair, tmp_path):
    summary = json.loads(json.dumps(plan_summary(plan(*pair, tmp_path / "out", options=Options(skip=("a",))))))
    totals = summary["totals"]
    assert totals["tensors"] == len(summary["steps"]) == 4
    assert totals["bytes"] == sum(step["bytes"] for step in summary["steps"])
    assert (totals["extrapolated_tensors"], totals["extrapolated_bytes"]) == (1, 384)
    assert totals["copied_bytes"] == totals["bytes"] - 384
    assert summary["options"]["skip"] == ["a"]
    stack = summary["steps"][1]
    assert (stack["matrices"], stack["shape"], stack["dtype"], stack["base_dtype"]) == (2, [2, 3, 32], "BF16", "F32")


# What is refused, and as what


def raised_by(kind, *args, **kwargs):
    with pytest.raises(errors.LoxError) as raised:
        plan(*args, **kwargs)
    assert type(raised.value) is kind
    return str(raised.value)


def test_options_that_mean_nothing_are_refused_before_anything_is_opened(tmp_path):
    assert "--rank" in raised_by(errors.OptionError, tmp_path / "no", tmp_path / "no", options=Options(rank=-1))
    assert "--resume" in raised_by(errors.OptionError, "no", "no", tmp_path / "o", resume=True, overwrite=True)


def test_problems_of_one_kind_come_as_that_kind(pair, tmp_path):
    options = Options(skip=("nothing*",))
    assert "nothing*" in raised_by(errors.OptionError, *pair, tmp_path / "out", options=options)
    assert "is the folder of base" in raised_by(errors.OutputError, *pair, pair[0])
    assert "no such file" in raised_by(errors.CheckpointError, pair[0], tmp_path / "no", tmp_path / "out")


def test_problems_of_all_kinds_come_at_once(pair, tmp_path):
    save(pair[0] / "model.safetensors", a=([8, 7], "F32"), stack=([2, 3, 32], "F32"))
    (pair[0] / "config.json").write_text('{"architectures": ["Y"]}')
    text = raised_by(errors.CheckpointError, *pair, pair[1] / "out", options=Options(only=("nope",), skip=("a", "zip")))
    for words in ("architectures", "'nope'", "'zip'", "lies inside aligned"):
        assert words in text
    text = raised_by(errors.CheckpointError, *pair, pair[1] / "out", options=Options(skip=("zip",)))
    for words in ("(8, 7)", "'zip'", "lies inside aligned"):
        assert words in text


def test_both_sides_are_opened_before_anything_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "aligned").mkdir()
    (tmp_path / "aligned" / "model.gguf").write_text("x")
    text = raised_by(errors.CheckpointError, tmp_path / "base", tmp_path / "aligned", tmp_path / "base")
    assert f"base: {tmp_path / 'base'}" in text
    assert f"aligned: {tmp_path / 'aligned'}" in text
    assert "is the folder of base" in text


@pytest.mark.parametrize("as_file", [False, True])
def test_one_model_as_both_sides_is_refused_also_through_a_link(pair, tmp_path, as_file):
    (tmp_path / "link").symlink_to("aligned")
    other = tmp_path / "link" / "model.safetensors" if as_file else tmp_path / "link"
    text = raised_by(errors.CheckpointError, other, pair[1], tmp_path / "out")
    assert "same files" in text
    assert "expected two different models" in text


def test_a_companion_that_cannot_be_copied_is_a_problem_of_aligned_only(pair, tmp_path):
    (pair[0] / "tokenizer.json").write_text(LFS)
    plan(*pair, tmp_path / "out")
    (pair[1] / "tokenizer.json").write_text(LFS)
    (pair[1] / "vocab.json").symlink_to("gone")
    text = raised_by(errors.CheckpointError, *pair, tmp_path / "out")
    assert "git lfs pull" in text
    assert "vocab.json: is a link to gone" in text
    plan(*pair)  # nothing is copied by a stream


def test_what_exceeds_the_memory_budget_is_refused_with_the_budget_that_would_do(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "step_bytes", lambda m, n, rank, svd: m * n * (100 if svd == "exact" else 1) << 20)
    options = Options(rank=2, svd="exact", memory_bytes=1000 << 20)
    text = raised_by(errors.MemoryBudgetError, *pair, tmp_path / "out", options=options)
    assert text.startswith("stack: needs ")
    assert "--memory 9600MiB" in text
    assert "1 more" in text
    assert "--svd randomized" in text
    made = plan(*pair, options=Options(rank=2, memory_bytes=96 << 20))
    assert [memory_needed(step, made.options) >> 20 for step in made.steps] == [48, 96, 0, 0]
    assert "--svd" not in raised_by(errors.MemoryBudgetError, *pair, options=Options(rank=2, memory_bytes=1))


# Warnings


def test_an_input_that_is_an_output_is_a_warning(pair):
    (pair[1] / "lox_stream.json").write_text("{}")
    assert any("output of lox-stream" in warning for warning in plan(*pair).warnings)


@pytest.mark.parametrize(
    ("name", "text"),
    [("chat_template.jinja", "x"), ("chat_template.json", "{}"), ("tokenizer_config.json", '{"chat_template": "x"}')],
)
def test_a_chat_template_in_base_alone_asks_whether_the_two_are_swapped(pair, name, text):
    (pair[1] / "tokenizer_config.json").write_text("{}")
    (pair[0] / name).write_text(text)
    assert any("swapped" in warning for warning in plan(*pair).warnings)
    assert plan(pair[0], pair[1] / "model.safetensors").warnings == ()  # a single file has no template to lack
    (pair[1] / name).write_text(text)
    assert plan(*pair).warnings == ()


def test_a_tokenizer_config_that_is_no_json_is_copied_as_it_is(pair):
    (pair[0] / "tokenizer_config.json").write_text("{")
    assert plan(*pair).warnings == ()


def test_planning_ten_thousand_tensors_takes_a_moment(tmp_path):
    tensors = {f"model.layers.{i // 100}.experts.{i % 100}.weight": ([2, 2], "BF16") for i in range(10_000)}
    for side in ("base", "aligned"):
        save(tmp_path / side / "model.safetensors", **tensors)
    assert len(plan(tmp_path / "base", tmp_path / "aligned").steps) == 10_000


@pytest.mark.parametrize(
    ("place", "kind"),
    [("checkpoint.find_companions", errors.CheckpointError), ("output_rules.shutil.disk_usage", errors.OutputError)],
)
def test_what_the_system_refuses_is_a_problem_like_the_others(pair, tmp_path, monkeypatch, place, kind):
    def fails(*args: object) -> None:
        raise OSError(5, "Input/output error", str(tmp_path / "some file"))

    monkeypatch.setattr(f"lox_stream.{place}", fails)
    with pytest.raises(kind, match=r"some file.*Input/output error|Input/output error.*some file"):
        plan(*pair, tmp_path / "out")


def test_a_folder_of_aligned_that_cannot_be_listed_is_not_left_out_in_silence(pair, tmp_path, monkeypatch):
    real = os.scandir
    for side in pair:
        (side / "code").mkdir()
        (side / "code" / "modeling.py").write_text("")

    def fails(path: str) -> object:
        if Path(path).name == "code":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(errors.CheckpointError) as raised:
        plan(*pair, tmp_path / "out")
    assert len(raised.value.problems) == 1
    assert str(pair[1] / "code") in raised.value.problems[0]
