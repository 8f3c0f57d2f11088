"""A damaged output: every flipped bit is found and named, and a repair makes just that again, to the same bytes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lox_stream import Cancelled, OptionError, Options, OutputError, ResumeError, extrapolate
from lox_stream.cli import commands
from lox_stream.cli_run import repaired_text
from lox_stream.locating import locate
from lox_stream.output_rules import JOURNAL, MANIFEST
from lox_stream.resuming import Damage
from lox_stream.sealing import opened, sealed
from lox_stream.shards import read_shard
from lox_stream.synthetic import pair_of
from lox_stream.verifying import Check, verify_checksums

INDEX = "model.safetensors.index.json"
KINDS = ("one file", "two shards", "from torch")


def make(root: Path, kind: str) -> tuple[Path, Path, Path]:
    """(base, aligned, finished output) of some matrices, a copied vector and integers, with companions."""
    generator = torch.Generator().manual_seed(0)
    pairs = {f"layers.{i}.weight": pair_of(24, 20, generator) for i in range(3)}
    pairs |= {"norm.weight": (torch.ones(5), torch.full((5,), 2.0)), "steps": (torch.arange(3), torch.arange(3))}
    for side, folder in enumerate(("base", "aligned")):
        (root / folder / "assets").mkdir(parents=True)
        write(root / folder, {name: both[side] for name, both in pairs.items()}, kind)
        (root / folder / "config.json").write_text('{"model_type": "llama"}')
        (root / folder / "assets" / "tokenizer.model").write_bytes(bytes(range(200)))
    extrapolate(root / "base", root / "aligned", root / "out", options=Options(rank=2))
    return root / "base", root / "aligned", root / "out"


def write(folder: Path, tensors: dict[str, torch.Tensor], kind: str) -> None:
    if kind == "from torch":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "one file":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = sorted(tensors)
        shards = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
        for name, held in shards.items():
            save_file({key: tensors[key] for key in held}, folder / name, metadata={"format": "pt"})
        weight_map = {key: name for name, held in shards.items() for key in held}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make(tmp_path_factory.mktemp("made"), request.param)


@pytest.fixture
def sides(made: tuple[Path, Path, Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """The inputs, and a copy of the output for this test alone."""
    base, aligned, out = made
    shutil.copytree(out, tmp_path / "out")
    return base, aligned, tmp_path / "out"


def mend(sides: tuple[Path, Path, Path], **more: object):
    return extrapolate(*sides, **({"options": Options(rank=2), "resume": True, "repair": True} | more))


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def failures(out: Path) -> list[Check]:
    return [check for check in verify_checksums(out) if not check.ok]


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def same_but_for_times(found: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """Every byte, but of the manifest, which says that another session worked on the output, and how long."""
    assert found.keys() == whole.keys()
    assert [name for name in whole if name != MANIFEST and found[name] != whole[name]] == []
    manifests = [json.loads(side[MANIFEST]) for side in (found, whole)]
    assert opened(found[MANIFEST]).state == "whole"
    for manifest in manifests:
        del manifest["times"], manifest["seal"]
        for row in manifest["tensors"].values():
            del row["elapsed_s"]
    assert manifests[0] == manifests[1]


def part_at(out: Path, name: str, byte: int) -> tuple[str, str]:
    """(name, part) of what a byte of a file belongs to, by the header of the undamaged file."""
    if not name.endswith(".safetensors"):
        return name, "file"
    shard = read_shard(out / name)
    inside = [info.name for info in shard.tensors if info.start <= byte < info.start + info.n_bytes]
    return (inside[0], "tensor") if inside else (name, "header")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_named_and_repaired(made, tmp_path, data):
    base, aligned, whole_out = made
    whole = content(whole_out)
    name = data.draw(st.sampled_from(sorted(whole)))
    bit = data.draw(st.integers(0, 8 * len(whole[name]) - 1))
    part, kind = part_at(whole_out, name, bit // 8)
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(whole_out, out)
    flip(out / name, bit)
    (failed,) = failures(out)
    assert (failed.file, failed.name, failed.part) == (name, part, kind)
    assert str(out / name) in failed.message
    located = list(locate(out, base, aligned, [failed]))
    if name == MANIFEST:
        assert f"byte {bit // 8} is flipped" in failed.message
    else:
        (wrong,) = located
        assert (wrong.first_byte, wrong.n_bytes) == (bit // 8, 1)
        assert (wrong.found, wrong.expected) == (whole[name][bit // 8] ^ 1 << bit % 8, whole[name][bit // 8])
    summary = mend((base, aligned, out))
    assert summary.repaired == (Damage(part, name),)
    n_bytes = json.loads(whole[MANIFEST])["tensors"][part]["n_bytes"] if kind == "tensor" else 0
    assert summary.written_bytes == n_bytes, "nothing else is computed"
    same_but_for_times(content(out), whole)
    assert failures(out) == []


def test_a_whole_output_is_not_touched(sides):
    before = {path: path.stat().st_mtime_ns for path in sides[2].rglob("*")}
    summary = mend(sides)
    assert (summary.repaired, summary.read_bytes, summary.written_bytes) == ((), 0, 0)
    assert {path: path.stat().st_mtime_ns for path in sides[2].rglob("*")} == before


@pytest.mark.parametrize("made", ["two shards"], indirect=True)
def test_a_shard_that_is_right_is_not_touched(sides):
    damaged, right = sorted(sides[2].glob("*.safetensors"))
    before = right.stat()
    flip(damaged, 8 * damaged.stat().st_size - 1)
    mend(sides)
    after = right.stat()
    assert (after.st_ctime_ns, after.st_ino) == (before.st_ctime_ns, before.st_ino), "not even its name was another"


def shard_of(out: Path) -> Path:
    return sorted(out.glob("*.safetensors"))[0]


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [remove, cut, lengthen, into_pipe])
@pytest.mark.parametrize("of", ["weights", "config.json", "assets/tokenizer.model", "README.md"])
def test_files_that_are_missing_cut_or_something_else_are_repaired(sides, damage, of):
    out = sides[2]
    whole = content(out)
    damage(shard_of(out) if of == "weights" else out / of)
    assert failures(out)
    assert mend(sides).repaired
    same_but_for_times(content(out), whole)


def test_tensors_after_one_that_cannot_be_read_are_not_taken_for_right(sides, monkeypatch):
    out = sides[2]
    whole = content(out)
    name = next(name for name in whole if name.endswith(".safetensors"))
    last = read_shard(out / name).tensors[-1]
    flip(out / name, 8 * last.start + 1)
    real, reads = os.pread, itertools.count()

    def fails_once(fd: int, n_bytes: int, offset: int) -> bytes:
        if Path(f"/proc/self/fd/{fd}").resolve() == out / name and next(reads) == 1:  # 0 is the header
            raise OSError(5, "Input/output error")
        return real(fd, n_bytes, offset)

    monkeypatch.setattr(os, "pread", fails_once)
    repaired = mend(sides).repaired
    assert Damage(last.name, name) in repaired
    same_but_for_times(content(out), whole)


def test_a_damaged_shard_that_another_name_shares_is_left_to_that_name(sides, tmp_path):
    """A copy by `cp -l`, or a link to an input: a repair in place would write into it."""
    out = sides[2]
    whole, shard = content(out), shard_of(out)
    flip(shard, 8 * shard.stat().st_size - 1)
    damaged = shard.read_bytes()
    os.link(shard, tmp_path / "second")
    mend(sides)
    same_but_for_times(content(out), whole)
    assert (tmp_path / "second").read_bytes() == damaged
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    flip(tmp_path / "elsewhere", 8 * shard.stat().st_size - 1)
    mend(sides)
    assert not shard.is_symlink()
    same_but_for_times(content(out), whole)
    assert (tmp_path / "elsewhere").read_bytes() == damaged


class Killed(BaseException):
    pass


def killed_at(patch: pytest.MonkeyPatch, moment: int) -> Iterator[int]:
    """Every step that changes a name or makes one durable counts; the one of this number ends the process."""
    counter = itertools.count()

    def counting(real):
        def step(*args, **more):
            if next(counter) == moment:
                raise Killed
            return real(*args, **more)

        return step

    for owner, name in ((os, "fsync"), (os, "fdatasync"), (Path, "replace"), (Path, "unlink")):
        patch.setattr(owner, name, counting(getattr(owner, name)))
    return counter


def assert_untouched_or_mended(out: Path, whole: dict[str, bytes]) -> None:
    """A folder that shows a manifest and no journal is as the damage left it, or as the repair did."""
    found = content(out)
    wrong = [name for name in whole if found[name] != whole[name] and name != MANIFEST]
    assert wrong in ([], sorted(["config.json", shard_of(out).name]))


@pytest.mark.parametrize("bit", [64 + 8, -1], ids=["header", "tensor"])
@pytest.mark.parametrize("then", [{"repair": True}, {"repair": False}], ids=["repair", "resume"])
@pytest.mark.parametrize("made", ["one file", "two shards"], indirect=True)
def test_a_repair_that_crashes_at_any_step_is_repaired_by_the_same_command(made, tmp_path, then, bit):
    base, aligned, whole_out = made
    whole, out = content(whole_out), tmp_path / "out"
    for moment in itertools.count():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole_out, out)
        flip(shard_of(out), bit % (8 * shard_of(out).stat().st_size))
        flip(out / "config.json", 9)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, moment)
            try:
                mend((base, aligned, out))
                break
            except Killed:
                pass
        shown = (out / MANIFEST).exists() and not (out / JOURNAL).exists()
        if (out / MANIFEST).exists():
            assert not list(out.glob("*.safetensors.partial")), "withdrawn before its weights are"
        if then["repair"] or not shown:
            mend((base, aligned, out), **then)
            same = content(out)
            same.pop(f"{JOURNAL}.partial", None)
            same_but_for_times(same, whole)
        else:
            assert_untouched_or_mended(out, whole)
    assert moment > 15


def test_a_bit_in_each_file_is_repaired_at_once(sides):
    out = sides[2]
    whole = content(out)
    for name in whole:
        flip(out / name, 8 * (len(whole[name]) // 2))
    assert {damage.file for damage in mend(sides).repaired} == whole.keys()
    same_but_for_times(content(out), whole)


def test_the_bytes_that_a_cut_file_lacks_are_counted(sides):
    base, aligned, out = sides
    size = (out / "config.json").stat().st_size
    os.truncate(out / "config.json", size - 3)
    (wrong,) = locate(out, base, aligned, failures(out))
    assert (wrong.first_byte, wrong.n_bytes, wrong.found) == (size - 3, 3, None)


def test_an_unfinished_run_without_damage_is_finished(made, tmp_path):
    base, aligned, whole_out = made

    def stop(progress):
        if progress.done_tensors == progress.total_tensors - 1:
            raise Killed

    with pytest.raises(Killed):
        extrapolate(base, aligned, tmp_path / "out", options=Options(rank=2), progress=stop)
    summary = mend((base, aligned, tmp_path / "out"))
    assert summary.repaired == ()
    assert repaired_text(summary).endswith("is as it was written; the run is finished")
    same_but_for_times(content(tmp_path / "out"), content(whole_out))


def test_an_unfinished_run_is_repaired_and_finished(made, tmp_path):
    base, aligned, whole_out = made
    whole, out = content(whole_out), tmp_path / "out"

    def stop(progress):
        if progress.done_tensors == progress.total_tensors - 1:
            raise Killed

    with pytest.raises(Killed):
        extrapolate(base, aligned, out, options=Options(rank=2), progress=stop)
    finished = [json.loads(line)["tensor"]["name"] for line in (out / JOURNAL).read_bytes().split(b"\n")[2:-1]]
    shard = json.loads(whole[MANIFEST])["tensors"][finished[0]]["shard"]
    (info,) = [info for info in read_shard(whole_out / shard).tensors if info.name == finished[0]]
    flip(out / f"{shard}.partial", 8 * info.start)
    assert mend((base, aligned, out)).repaired == (Damage(finished[0], shard),)
    same_but_for_times(content(out), whole)


@pytest.mark.parametrize(
    "options", [Options(rank=3), Options(rank=2, alpha=1.0), Options(rank=2, rounding="stochastic")]
)
def test_other_options_are_refused_as_a_resume_is(sides, options):
    before = content(sides[2])
    with pytest.raises(ResumeError, match="another run"):
        mend(sides, options=options)
    assert content(sides[2]) == before


def test_other_weights_of_the_same_shape_are_refused(sides, tmp_path):
    base, aligned, out = sides
    shutil.copytree(aligned, tmp_path / "aligned")
    for path in [*(tmp_path / "aligned").glob("*.safetensors"), *(tmp_path / "aligned").glob("*.bin")]:
        flip(path, 8 * (path.stat().st_size - path.stat().st_size // 4))
    before = content(out)
    with pytest.raises(ResumeError, match=r"aligned .*: not the file that the run began with \(sample differ\)"):
        mend((base, tmp_path / "aligned", out))
    assert content(out) == before


def test_a_manifest_that_is_lost_cannot_be_repaired_and_the_way_out_is_said(sides):
    out = sides[2]
    data = (out / MANIFEST).read_bytes()
    (out / MANIFEST).write_bytes(data.replace(b'"rank": 2', b'"rank": 4'))
    (failed,) = failures(out)
    assert failed.name == MANIFEST
    with pytest.raises(OutputError, match="--overwrite"):
        mend(sides, options=Options(rank=4))
    (out / MANIFEST).write_bytes(data[: len(data) // 2])
    with pytest.raises(OutputError, match=r"was changed or damaged.*--overwrite"):
        mend(sides)
    (out / MANIFEST).unlink()
    with pytest.raises(OutputError, match=r"cannot be repaired: found .*expected lox_stream\.json or"):
        mend(sides)


def test_options_that_were_edited_are_damage_and_not_another_run(sides):
    manifest = sides[2] / MANIFEST
    manifest.write_text(manifest.read_text().replace('"alpha": 1.25', '"alpha": 2.5'))
    with pytest.raises(OutputError, match="was changed or damaged beyond one bit"):
        mend(sides)


def test_an_output_that_may_not_be_written_is_left_as_it_is(sides, monkeypatch):
    path = shard_of(sides[2])
    flip(path, 8 * path.stat().st_size - 1)
    before = content(sides[2])
    monkeypatch.setattr(os, "access", lambda asked, mode: Path(asked) != path)
    with pytest.raises(OutputError, match=rf"{path.name}: no permission to read and write it\. Give it: chmod u\+rw"):
        mend(sides)
    assert content(sides[2]) == before


def test_a_manifest_without_its_seal_is_one_that_was_changed(sides):
    out = sides[2]
    manifest = json.loads((out / MANIFEST).read_text())
    del manifest["seal"]
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    assert [check.name for check in failures(out)] == [MANIFEST]
    with pytest.raises(OutputError, match="was changed or damaged"):
        mend(sides)
    (out / MANIFEST).write_text('{"format": 1, "shards": {}, "tensors": {}, "inputs": {}, "options": {}, "totals": {}}')
    assert [check.name for check in failures(out)] == [MANIFEST]


def test_bytes_that_come_out_otherwise_are_said(sides):
    """As on a machine with other vector units: the manifest had a checksum that nobody can reach here."""
    out = sides[2]
    manifest = json.loads((out / MANIFEST).read_bytes())
    del manifest["seal"]
    manifest["tensors"]["layers.1.weight"]["xxh3_128"] = "00" * 16
    (out / MANIFEST).write_bytes(sealed(json.dumps(manifest, indent=2).encode() + b"\n"))
    (failed,) = [check for check in failures(out) if check.part == "tensor"]
    flip(out / failed.file, 8 * failed.first_byte)
    assert list(locate(*reversed_sides(sides), failures(out))) == [], "no byte can be called wrong"
    assert any("other bytes than before: layers.1.weight" in warning for warning in mend(sides).warnings)
    assert failures(out) == []


@pytest.mark.parametrize("sessions", ["1e999", "null", "[]"])
def test_a_manifest_of_an_unknown_past_is_refused(sides, sessions):
    data = (sides[2] / MANIFEST).read_bytes()
    unsealed = data[: data.index(b',\n  "seal"')].replace(b'"sessions": 1', f'"sessions": {sessions}'.encode())
    (sides[2] / MANIFEST).write_bytes(sealed(unsealed + b"\n}\n"))
    with pytest.raises(OutputError, match="parts of the manifest mean nothing"):
        mend(sides)


def test_another_version_is_a_warning(sides):
    out = sides[2]
    manifest = json.loads((out / MANIFEST).read_bytes())
    del manifest["seal"]
    manifest["versions"]["torch"] = "0.4.1"
    (out / MANIFEST).write_bytes(sealed(json.dumps(manifest, indent=2).encode() + b"\n"))
    assert any("torch is" in warning and "0.4.1" in warning for warning in mend(sides).warnings)


def test_the_check_of_every_byte_can_be_stopped_and_reports_its_progress(sides):
    out, stop, seen = sides[2], threading.Event(), []
    flip(shard_of(out), 8 * shard_of(out).stat().st_size - 1)
    damaged = content(out)

    def watch(progress):
        seen.append(progress.done_bytes / progress.total_bytes)
        if len(seen) == 3:
            stop.set()

    with pytest.raises(Cancelled):
        mend(sides, progress=watch, cancel=stop)
    assert content(out) == damaged
    assert seen == sorted(seen)
    assert max(seen) < 1


def test_a_companion_that_is_gone_at_the_end_leaves_a_run_that_can_be_resumed(made, tmp_path):
    base, aligned, _ = made
    shutil.copytree(aligned, tmp_path / "aligned")
    gone = tmp_path / "aligned" / "assets" / "tokenizer.model"

    def take_away(progress):
        if progress.done_tensors == progress.total_tensors:
            gone.unlink(missing_ok=True)

    with pytest.raises(OutputError, match=r"tokenizer.model: cannot read it: .* --resume goes on"):
        extrapolate(base, tmp_path / "aligned", tmp_path / "out", options=Options(rank=2), progress=take_away)
    gone.write_bytes((aligned / "assets" / "tokenizer.model").read_bytes())
    extrapolate(base, tmp_path / "aligned", tmp_path / "out", options=Options(rank=2), resume=True)
    assert failures(tmp_path / "out") == []


def reversed_sides(sides: tuple[Path, Path, Path]) -> tuple[Path, Path, Path]:
    return sides[2], sides[0], sides[1]


def test_repair_without_resume_or_into_nothing_is_refused(sides, tmp_path):
    with pytest.raises(OptionError, match="--repair is given without --resume"):
        mend(sides, resume=False)
    with pytest.raises(OutputError, match="cannot be repaired: found nothing"):
        mend((*sides[:2], tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def lox(*words: object):
    return CliRunner().invoke(commands, [str(word) for word in words])


def test_the_command_says_what_was_repaired_in_one_line(sides):
    base, aligned, out = sides
    command = ["run", "--base", base, "--aligned", aligned, "--out", out, "--rank", 2, "--resume", "--repair"]
    assert lox(*command).output.strip() == f"nothing to repair: every byte of {out} is as it was written"
    shard = shard_of(out)
    info = read_shard(shard).tensors[-1]
    flip(shard, 8 * info.start + 5)
    flip(out / "config.json", 0)
    result = lox("verify", out, "--base", base, "--aligned", aligned)
    assert result.exit_code == 1
    assert f"{shard.name}: {info.name}: byte {info.start} of the file is 0x" in result.stdout
    failed = json.loads(lox("verify", out, "--base", base, "--aligned", aligned, "--json").stdout)["failed"]
    assert [(row["file"], row["part"], row["wrong"]) for row in failed] == [
        ("config.json", "file", {"first_byte": 0, "bytes": 1}),
        (shard.name, "tensor", {"first_byte": info.start, "bytes": 1}),
    ]
    flip(shard, 75)
    result = lox(*command)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"repaired 1 of 5 tensors: {info.name} in {shard.name}",
        f"  written again: config.json, header of {shard.name}",
    ]
    flip(shard, 8 * info.start + 5)
    document = json.loads(lox(*command, "--json", "--quiet").stdout)
    assert document["repaired"] == [{"name": info.name, "file": shard.name}]
    assert lox(*command, "--dry-run").exit_code == 2


def test_several_bits_that_look_like_one_to_the_crc_are_not_put_right():
    """A pattern that no CRC-32 sees, which is its polynomial, and a bit beside it."""
    damaged = bytearray(sealed(json.dumps({"a": "x" * 100}, indent=2).encode() + b"\n"))
    for bit in [8 * 20 + i for i in range(33) if 0x104C11DB7 >> (32 - i) & 1] + [8 * 40]:
        damaged[bit // 8] ^= 1 << bit % 8
    assert opened(bytes(damaged)).state == "broken"


@given(document=st.dictionaries(st.text(), st.floats(allow_nan=False) | st.text(), min_size=1), data=st.data())
@example({"a": 1.0}, None)
def test_a_seal_puts_any_single_bit_right_and_no_pair_of_bytes(document, data):
    whole = sealed(json.dumps(document, indent=2).encode() + b"\n")
    assert {key: value for key, value in json.loads(whole).items() if key != "seal"} == {
        key: value for key, value in document.items() if key != "seal"
    }
    assert opened(whole).state == "whole"
    last = 8 * len(whole) - 1
    for bit in range(last + 1) if data is None else [data.draw(st.integers(0, last))]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        found = opened(bytes(damaged))
        assert (found.data, found.state, found.at) == (whole, "mended", bit // 8)
        damaged[0] ^= 0xFF
        assert opened(bytes(damaged)).state in ("broken",) or bit < 8
    assert opened(np.random.default_rng(0).bytes(200)).state == "broken"
