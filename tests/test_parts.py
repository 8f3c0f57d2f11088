"""One run on several machines: shares of the files, each an output of its own, put together to the bytes of one run."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from folders import write

from lox_stream import CheckpointError, Options, OutputError, extrapolate, files, finish, finishing, plan
from lox_stream.cli import commands
from lox_stream.synthetic import llama_shapes, pair_of, write_pair
from lox_stream.verifying import verify_checksums

COUNT = 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base, aligned = write_pair(folder, llama_shapes(64, 96, 4, 256, 32), aligned_shards=5)
    (aligned / "tokenizer.json").write_text("{}")
    return base, aligned


@pytest.fixture(scope="module")
def right(pair, tmp_path_factory):
    return outputs(extrapolate(*pair, tmp_path_factory.mktemp("out") / "out").out)


def outputs(folder: Path) -> dict[str, bytes]:
    """All files of an output but its manifest, which tells of times and sessions, and its card, which has its name."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if name not in ("lox_stream.json", "README.md")}


def part(pair, out: Path, number: int, **options: object) -> Path:
    return extrapolate(*pair, out, options=Options(part=f"{number}/{COUNT}", **options)).out


def parts(pair, out: Path, numbers=(2, 1, 3), **options: object) -> Path:
    for number in numbers:
        part(pair, out, number, **options)
    return out


def test_parts_that_are_put_together_are_one_run(pair, right, tmp_path):
    out = parts(pair, tmp_path / "out")
    assert not list(out.glob("*.json")), "nothing can be loaded yet"
    assert {path.name for path in out.iterdir()} == {f"part-{i}-of-3" for i in (1, 2, 3)}
    summary = finish(out)
    assert outputs(out) == right
    assert not list(out.glob("part-*"))
    assert summary.totals.extrapolated == 29
    assert all(check.ok for check in verify_checksums(out))
    assert json.loads((out / "lox_stream.json").read_text())["options"]["part"] == ""


def test_each_file_is_in_one_part_and_the_parts_are_of_a_size(pair):
    names, sizes = [], []
    for number in range(1, COUNT + 1):
        made = plan(*pair, "out", options=Options(part=f"{number}/{COUNT}"))
        names += [shard.name for shard in made.written.shards]
        sizes.append(sum(shard.size_bytes for shard in made.written.shards))
        assert {step.name for step in made.steps} == made.written.tensors.keys()
    assert sorted(names) == sorted(shard.name for shard in plan(*pair).written.shards)
    assert max(sizes) <= 2 * min(sizes)


def test_a_part_is_resumed_repaired_and_verified_as_any_output(pair, right, tmp_path):
    out = parts(pair, tmp_path / "out")
    place = out / "part-2-of-3"
    (file,) = list(place.glob("*.safetensors"))[:1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert not all(check.ok for check in verify_checksums(place))
    summary = extrapolate(*pair, out, options=Options(part="2/3"), resume=True, repair=True)
    assert len(summary.repaired or ()) == 1
    finish(out)
    assert outputs(out) == right


def test_what_was_damaged_in_a_part_is_made_again(pair, right, tmp_path):
    out = parts(pair, tmp_path / "out")
    file = next((out / "part-3-of-3").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    finish(out)
    assert outputs(out) == right


@pytest.mark.parametrize("at", range(1, 12))
def test_a_crash_while_they_are_put_together_is_gone_on_with(at, pair, right, tmp_path, monkeypatch):
    """Before, between and after the moves of files, at the publishing, and while the folders are removed."""
    out = parts(pair, tmp_path / "out")
    moved, removed, published = Path.replace, Path.rmdir, finishing.execute
    calls = []

    def counted(real):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                raise OutputError("a crash")
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", counted(moved))
        patch.setattr(Path, "rmdir", counted(removed))
        patch.setattr(finishing, "execute", counted(published))
        with contextlib.suppress(OutputError):
            finish(out)
    if list(out.glob("part-*")):
        finish(out)
    assert outputs(out) == right
    assert {path.name for path in out.iterdir() if path.name.startswith("part-")} == set()


def test_parts_that_are_missing_or_not_of_one_run_are_refused(pair, tmp_path):
    with pytest.raises(OutputError, match="holds no parts of a run"):
        finish(tmp_path)
    out = parts(pair, tmp_path / "out", (1, 3))
    with pytest.raises(OutputError, match=r"parts are missing or not finished: 2/3; expected all 3\. Run them"):
        finish(out)
    part(pair, out, 2, alpha=1.0)
    with pytest.raises(OutputError, match=r"parts 2 and 1 were told other options \(alpha is 1\.0 and 1\.25\)"):
        finish(out)
    shutil.rmtree(out / "part-2-of-3")
    other = write_pair(tmp_path / "other", llama_shapes(64, 96, 4, 256, 32), aligned_shards=5, seed=7)
    part(other, out, 2)
    with pytest.raises(Exception, match=r"is not what the output was made from"):
        finish(out)
    assert not list(out.glob("*.safetensors")), "nothing was moved"
    with pytest.raises(OutputError, match=r"holds parts of 3, and --part is 1/2"):
        extrapolate(*pair, out, options=Options(part="1/2"))


def test_inputs_may_lie_elsewhere_where_they_are_put_together(pair, right, tmp_path):
    moved = [tmp_path / "here" / side.name for side in pair]
    for side, place in zip(pair, moved, strict=True):
        shutil.copytree(side, place)
    out = parts(moved, tmp_path / "out")
    for place in moved:
        place.rename(place.with_name(f"moved-{place.name}"))
    base, aligned = (place.with_name(f"moved-{place.name}") for place in moved)
    finish(out, base=base, aligned=aligned)
    assert outputs(out) == right


def test_a_weight_of_fp8_and_its_scales_go_to_one_part(tmp_path):
    """In files of their own, which no part may have alone."""
    generator = torch.Generator().manual_seed(0)
    sides: tuple[dict, dict] = ({}, {})
    for i in range(4):
        for side, weight in zip(sides, pair_of(64, 32, generator), strict=True):
            scale = weight.float().abs().max() / 448
            side[f"l.{i}.up.weight"] = (weight.float() / scale).to(torch.float8_e4m3fn)
            side[f"l.{i}.up.weight_scale_inv"] = scale.reshape(1, 1)
    folders = [
        write(tmp_path / name, side, model_type="x") for name, side in zip(("base", "aligned"), sides, strict=True)
    ]
    how = {"max_shard_size": 700}
    whole = outputs(extrapolate(*folders, tmp_path / "whole", options=Options(**how)).out)
    assert len(whole) > 4
    out = parts(folders, tmp_path / "out", **how)
    finish(out)
    assert outputs(out) == whole


def lox(*words: object) -> object:
    return CliRunner().invoke(commands, [str(word) for word in words], prog_name="lox-stream")


def test_the_commands(pair, right, tmp_path):
    out = tmp_path / "out"
    for number in (1, 2, 3):
        ran = lox("run", "--base", pair[0], "--aligned", pair[1], "--out", out, "--part", f"{number}/3")
        assert ran.exit_code == 0, ran.output
        assert f"lox-stream finish {out}, once all 3 parts are finished" in " ".join(ran.stdout.split())
    done = lox("finish", out, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["totals"]["extrapolated"] == 29
    assert outputs(out) == right
    again = lox("finish", out)
    assert again.exit_code == 0, "a job that is begun again after its end"
    assert "is finished already" in again.stderr
    assert outputs(out) == right
    late = lox("run", "--base", pair[0], "--aligned", pair[1], "--out", out, "--part", "1/3", "--resume")
    assert late.exit_code == 1
    assert "perhaps of parts that were put together" in " ".join(late.stderr.split())


def test_a_finished_part_is_resumed_by_a_job_that_is_begun_again(pair, right, tmp_path):
    out = parts(pair, tmp_path / "out")
    words = ["run", "--base", pair[0], "--aligned", pair[1], "--out", out, "--part", "2/3"]
    again = lox(*words, "--resume")
    assert again.exit_code == 0, again.output
    assert "was finished before" in again.output
    without = lox(*words)
    assert without.exit_code == 1
    assert "holds a finished run" in without.stderr
    finish(out)
    assert outputs(out) == right


@pytest.mark.parametrize("stray", ["part-2-of-3/notes.txt", "part-1-of-3/sub/more.safetensors", "more.safetensors"])
def test_a_file_that_is_not_of_the_run_is_refused_before_anything_is_moved(stray, pair, tmp_path):
    out = parts(pair, tmp_path / "out")
    (out / stray).parent.mkdir(exist_ok=True)
    (out / stray).write_text("mine")
    before = set(out.rglob("*"))
    with pytest.raises(OutputError, match=stray):
        finish(out)
    assert set(out.rglob("*")) == before


def test_a_set_of_outputs_is_shared_too(pair, right, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        words = ["--alpha", "0.5,1.25", "--out", "out-{alpha}", "--part", f"{number}/2"]
        ran = lox("run", "--base", pair[0], "--aligned", pair[1], *words)
        assert ran.exit_code == 0, ran.output
    assert lox("finish", "out-1.25").exit_code == lox("finish", "out-0.5").exit_code == 0
    assert outputs(tmp_path / "out-1.25") == right
    assert outputs(tmp_path / "out-0.5").keys() == right.keys()


def test_folders_that_are_no_parts_are_refused(pair, tmp_path):
    out = parts(pair, tmp_path / "out")
    (out / "part-4-of-3").mkdir()
    with pytest.raises(OutputError, match=r"part-4-of-3: is a link, or a number that no part has"):
        finish(out)
    (out / "part-4-of-3").rmdir()
    (out / "part-2-of-3").rename(tmp_path / "elsewhere")
    (out / "part-2-of-3").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=r"part-2-of-3: is a link"):
        finish(out)
    assert not list(out.glob("*.safetensors"))


def test_a_part_that_is_being_written_is_left_alone(pair, tmp_path):
    out = parts(pair, tmp_path / "out")
    fd, _ = files.lock_folder(out / "part-2-of-3")
    with pytest.raises(OutputError, match="part-2-of-3: is being written"):
        finish(out)
    files.close(fd)
    assert not list(out.glob("*.safetensors"))


def test_inputs_that_have_moved_are_asked_for(pair, tmp_path):
    moved = [tmp_path / side.name for side in pair]
    for side, place in zip(pair, moved, strict=True):
        shutil.copytree(side, place)
    out = parts(moved, tmp_path / "out")
    moved[0].rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"is not there, where part 1 had it\. Say where it lies now: --base DIR"):
        finish(out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--part", "4/3"], "--part is '4/3', expected such as 2/8"),
        (["--part", "0/3"], "--part is '0/3'"),
        *((["--part", word], f"--part is '{word}', expected such as") for word in ("1", "a/b", "1/", "/2", "1.5/2")),
        (["--part", "1/9"], "the output has 5 files, which are not split"),
        (["--part", ""], "--part is empty, expected such as 2/8"),
        (["--part", "1/3", "--push-to", "me/model"], "--part and --push-to are both given, expected one"),
        (["--part", "1/3", "--save-factors", "factors"], "expected none for an adapter"),
    ],
    ids=str,
)
def test_parts_that_cannot_be_are_refused(words, said, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = lox("run", "--base", pair[0], "--aligned", pair[1], "--out", "out", *words)
    assert ran.exit_code == 2
    assert said in ran.stderr
    assert list(tmp_path.iterdir()) == []
