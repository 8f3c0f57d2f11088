"""Laws of the output folder: where it may lie, what it may hold, and that nothing is written while planning."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from lox_stream.checkpoint import open_checkpoint
from lox_stream.output_rules import JOURNAL, MANIFEST, held_names, output_names, output_problems, superseded
from lox_stream.sealing import sealed

Usage = namedtuple("Usage", "total used free")
N_BYTES = 4 << 20


@pytest.fixture
def work(tmp_path):
    """A folder with `base` and `aligned` in it: one tensor of 4 MiB, a tokenizer in a sub-folder."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [N_BYTES], "data_offsets": [0, N_BYTES]}}).encode()
    for side in ("base", "aligned"):
        (tmp_path / side / "sub").mkdir(parents=True)
        (tmp_path / side / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(N_BYTES))
        (tmp_path / side / "sub" / "vocab.txt").write_text("v")
    return tmp_path


def check(work, out, *, resume=False, overwrite=False, base="base", aligned="aligned"):
    catalogue = open_checkpoint(work / aligned)
    return output_problems(
        Path(work, out), {"base": work / base, "aligned": work / aligned}, catalogue, resume=resume, overwrite=overwrite
    )


def the_problem(*args, **kwargs):
    problems, _ = check(*args, **kwargs)
    assert len(problems) == 1, problems
    return problems[0]


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_the_names_written_are_those_of_aligned_and_our_own(work):
    names = output_names(open_checkpoint(work / "aligned"))
    assert set(names[:5]) == {"model.safetensors", "sub/vocab.txt", MANIFEST, JOURNAL, "README.md"}
    assert set(names[5:]) == {f"{name}.partial" for name in names[:5]}


@pytest.mark.parametrize("out", ["out", "new/deep/out", "out with spaces é 模型", "empty"])
def test_a_new_or_empty_folder_is_usable_and_planning_writes_nothing(work, out):
    (work / "empty").mkdir()
    before = sorted(work.rglob("*"))
    for flags in ({}, {"overwrite": True}):
        assert check(work, out, **flags) == ([], [])
    assert sorted(work.rglob("*")) == before


# Where it lies


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("aligned", "is the folder of aligned"),
        ("base", "is the folder of base"),
        ("base/../aligned", "is the folder of aligned"),
        ("aligned/out", "lies inside aligned"),
        ("base/deep/out", "lies inside base"),
        ("link", "is the folder of aligned"),
        ("link/out", "lies inside aligned"),
        ("aligned/model.safetensors", "is a file"),
        ("file/out", "is a file"),
        ("nowhere", "link to gone"),
        ("loop/out", "cannot be used"),
        ("x" * 300, "cannot be used"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_place_that_touches_an_input_or_cannot_be_a_folder_is_refused(work, out, words, overwrite):
    (work / "link").symlink_to("aligned")
    (work / "nowhere").symlink_to("gone")
    (work / "loop").symlink_to("loop")
    (work / "file").write_text("x")
    assert words in the_problem(work, out, overwrite=overwrite)


def test_a_folder_that_holds_the_inputs_is_refused(work):
    problems, _ = check(work, ".", overwrite=True)
    assert len(problems) == 2
    assert all("lies inside it" in problem for problem in problems)


def test_beside_a_single_file_is_fine_and_its_own_folder_is_not(work):
    assert check(work, "aligned/out", aligned="aligned/model.safetensors") == ([], [])
    assert "is the folder of aligned" in the_problem(work, "aligned", aligned="aligned/model.safetensors")


def test_no_permission_is_said_of_the_nearest_folder_that_exists(work, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)  # tests may run as root, whom no mode stops
    problem = the_problem(work, "new/out")
    assert "no permission" in problem
    assert f"write in {work}" in problem


def test_the_place_is_checked_even_when_aligned_cannot_be_opened(work):
    problems, _ = output_problems(
        work / "base", {"base": work / "base", "aligned": work / "no"}, None, resume=False, overwrite=False
    )
    assert "is the folder of base" in problems[0]
    fill(work / "out", "x")
    problems, _ = output_problems(
        work / "out", {"base": work / "base", "aligned": work / "no"}, None, resume=False, overwrite=False
    )
    assert "--overwrite" in problems[0]


# What it holds


@pytest.mark.parametrize(
    ("names", "words"),
    [(["notes.txt"], "holds files"), ([JOURNAL], "unfinished run"), ([MANIFEST], "finished run"), ([".x"], ".x")],
)
def test_a_folder_that_is_not_empty_names_both_ways_out(work, names, words):
    fill(work / "out", *names)
    problem = the_problem(work, "out")
    assert words in problem
    assert "--resume" in problem
    assert "--overwrite" in problem


@pytest.mark.parametrize(
    "names",
    [
        [MANIFEST, "notes.txt", "other/file"],
        [JOURNAL, "notes.txt"],
        ["model.safetensors", "sub/vocab.txt"],
        ["model.safetensors.partial"],
    ],
)
def test_overwrite_takes_a_folder_of_ours_or_of_our_names_only(work, names):
    fill(work / "out", *names)
    assert check(work, "out", overwrite=True) == ([], [])


@pytest.mark.parametrize("names", [["notes.txt"], ["model.safetensors", "thesis.doc"], ["sub/other.txt"], ["home/x"]])
@pytest.mark.parametrize("flag", ["overwrite", "resume"])
def test_files_of_somebody_else_are_not_touched(work, names, flag):
    fill(work / "out", *names)
    problem = the_problem(work, "out", **{flag: True})
    assert "does not write" in problem
    assert "Choose another --out" in problem


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00001-of-00002.safetensors"])
def test_weights_that_would_be_loaded_instead_of_ours_must_go_first(work, name):
    fill(work / "out", MANIFEST, name)
    problem = the_problem(work, "out", overwrite=True)
    assert name in problem
    assert "Move it away" in problem


@pytest.mark.parametrize("changed", ["nothing", "the manifest", "the file", "a pipe"])
def test_of_foreign_weights_only_those_that_a_sealed_manifest_names_are_given_up(work, changed):
    name, out = "model-00001-of-00002.safetensors", work / "out"
    fill(out, MANIFEST, name)
    (out / name).write_bytes(bytes(8))
    said = {"shards": {name: {"size": 8}}, "files": {}, "index": None}
    manifest = sealed(json.dumps(said, indent=2).encode() + b"\n")
    (out / MANIFEST).write_bytes(manifest)
    if changed == "the manifest":
        (out / MANIFEST).write_bytes(manifest.replace(b'"index"', b'"dexin"'))
    elif changed == "the file":
        (out / name).write_bytes(bytes(9))
    elif changed == "a pipe":
        (out / MANIFEST).unlink()
        os.mkfifo(out / MANIFEST)
    problems, _ = check(work, "out", overwrite=True)
    assert [name in problem for problem in problems] == [True] * (changed != "nothing")
    aligned = open_checkpoint(work / "aligned")
    assert superseded(out, aligned) == (() if problems else (name,))
    fill(out, "older.safetensors.partial")
    assert "older.safetensors.partial" in superseded(out, aligned)


@pytest.mark.parametrize("names", [[], ["model.safetensors.partial"]])
def test_resuming_nothing_starts_from_the_beginning_and_says_so(work, names):
    fill(work / "out", *names)
    problems, (warning,) = check(work, "out", resume=True)
    assert problems == []
    assert "from the beginning" in warning


def test_an_unfinished_run_is_resumed_and_a_finished_one_is_not(work):
    fill(work / "out", JOURNAL, "model.safetensors.partial", MANIFEST)
    assert check(work, "out", resume=True) == ([], [])
    (work / "out" / JOURNAL).unlink()
    assert "nothing to resume" in check(work, "out", resume=True)[0][0]


def test_whether_a_journal_is_of_this_run_is_left_to_the_journal(work):
    fill(work / "out", JOURNAL, "other-model.safetensors.partial", "model.safetensors.index.json")
    assert check(work, "out", resume=True) == ([], [])


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_a_partial_file_that_is_an_input_in_disguise_is_refused(work, flag, kind):
    fill(work / "out", JOURNAL)
    target, partial = work / "aligned" / "model.safetensors", work / "out" / "model.safetensors.partial"
    if kind == "link":
        partial.symlink_to(target)
    else:
        partial.hardlink_to(target)
    assert "model.safetensors.partial" in the_problem(work, "out", **{flag: True})


def test_a_linked_sub_folder_and_a_folder_in_place_of_a_file_are_refused(work):
    fill(work / "out", MANIFEST)
    (work / "out" / "sub").symlink_to(work / "aligned" / "sub")
    (work / "out" / "model.safetensors").mkdir()
    problems, _ = check(work, "out", overwrite=True)
    assert any("behind a link" in problem for problem in problems)
    assert any("is a folder" in problem for problem in problems)


def test_only_our_own_sub_folders_are_looked_into(work):
    fill(work / "out", "sub/vocab.txt", "sub/deep/x", "huge/x", "a")
    assert held_names(work / "out", ("sub/vocab.txt",)) == ("a", "huge/", "sub/deep/", "sub/vocab.txt")
    assert held_names(work / "none", ()) == ()


# Space


@pytest.fixture
def free(monkeypatch):
    """free(bytes): what the file system is said to have; asked of no folder that does not exist."""

    def say(n_bytes: int, total: int = 1 << 50) -> None:
        def usage(path):
            assert Path(path).is_dir()
            return Usage(total, 0, n_bytes)

        monkeypatch.setattr(shutil, "disk_usage", usage)

    return say


def test_a_full_disk_is_found_before_the_work_with_both_figures(work, free):
    free(N_BYTES)
    problem = the_problem(work, "new/out")
    assert "no space" in problem
    assert f"found {N_BYTES}" in problem
    free(N_BYTES + (2 << 20))
    assert check(work, "new/out") == ([], [])


def test_a_file_system_that_does_not_say_its_size_is_believed(work, free):
    free(0, total=0)
    assert check(work, "out") == ([], [])


@pytest.mark.parametrize(
    ("name", "flag", "enough"),
    [
        ("model.safetensors.partial", "resume", True),
        ("model.safetensors.partial", "overwrite", True),
        ("model.safetensors", "resume", True),
        ("model.safetensors", "overwrite", False),
    ],
)
def test_space_that_an_earlier_session_reserved_is_not_asked_for_again(work, free, name, flag, enough):
    fill(work / "out", JOURNAL)
    shutil.copy(work / "aligned" / "model.safetensors", work / "out" / name)
    free(2 << 20)
    problems, _ = check(work, "out", **{flag: True})
    assert (problems == []) == enough


def test_a_limit_on_the_size_of_files_is_found(work, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 20, resource.RLIM_INFINITY))
    problem = the_problem(work, "out")
    assert "ulimit -f unlimited" in problem
    assert str(1 << 20) in problem
