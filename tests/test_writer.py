"""The output folder: every byte in its place, nothing visible before the end, nothing lost by a crash."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from lox_stream import committer, files
from lox_stream.checkpoint import open_checkpoint
from lox_stream.cli import commands
from lox_stream.documents import written_documents
from lox_stream.errors import Cancelled, OutputError, ResumeError
from lox_stream.facts import TensorFacts
from lox_stream.journal import replay
from lox_stream.options import Options
from lox_stream.output_rules import JOURNAL, MANIFEST
from lox_stream.placing import Place
from lox_stream.planning import Plan
from lox_stream.writer import Output

INDEX = "model.safetensors.index.json"
ONE = {"model.safetensors": {"a": (3, 5), "b": (7,), "empty": (0, 4)}}
TWO = {
    "model-00001-of-00002.safetensors": {"a": (3, 5), "b": (7,)},
    "model-00002-of-00002.safetensors": {"c": (4, 4), "d": (2, 2, 2)},
}


def make(folder: Path, shards: dict[str, dict[str, tuple[int, ...]]], seed: int = 0) -> Path:
    """A checkpoint of random float32 tensors, with companions of every kind."""
    rng = np.random.default_rng(seed)
    (folder / "code").mkdir(parents=True)
    for name, shapes in shards.items():
        tensors = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        (folder / name).write_bytes(save(tensors, {"format": "pt"}))
    if len(shards) > 1:
        weight_map = {key: name for name, shapes in shards.items() for key in shapes}
        index = {"metadata": {"total_size": 1, "total_parameters": 38}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# aligned\n")
    (folder / "code" / "run.sh").write_text("#!/bin/sh\n")
    (folder / "code" / "run.sh").chmod(0o755)
    (folder / "code" / "link.txt").symlink_to(folder / "config.json")
    return folder


@pytest.fixture(params=[ONE, TWO], ids=["one", "two"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Plan:
    make(tmp_path / "base", request.param, seed=1)
    make(tmp_path / "aligned", request.param, seed=2)
    return plan_of(tmp_path)


def plan_of(root: Path, out: str = "out", options: Options = Options()) -> Plan:  # noqa: B008
    base, aligned = open_checkpoint(root / "base"), open_checkpoint(root / "aligned")
    return Plan(base, aligned, aligned, root / out, options, (), ())


def copy_tensor(output: Output, name: str, step: int = 13) -> None:
    """Write one tensor of aligned through the output, in small pieces from the back, and hand it in."""
    tensor = output.plan.aligned.tensors[name]
    with tensor.path.open("rb") as file:
        data = os.pread(file.fileno(), tensor.n_bytes, tensor.start)
    place = output.place(name)
    for offset in reversed(range(0, len(data), step)):
        place.write(offset, data[offset : offset + step])
    output.done(TensorFacts(name, "copy", "vector", tensor.n_bytes, 0.0, place.checksum()))


def copy_all(output: Output) -> list[str]:
    """Copy what is not finished and publish; returns the tensors that were copied."""
    todo = [name for name in output.plan.aligned.tensors if name not in output.finished]
    for name in todo:
        copy_tensor(output, name)
    output.publish(written_documents(output.plan, output.finished, elapsed_s=1.0, sessions=output.sessions))
    return todo


def run(plan: Plan, *, resume: bool = False, overwrite: bool = False) -> list[str]:
    with Output(plan, resume=resume, overwrite=overwrite) as output:
        return copy_all(output)


def start(plan: Plan, *names: str, error: BaseException | None = None) -> None:
    """Copy some tensors, then leave without publishing, by an error if one is given."""
    with Output(plan) as output:
        for name in names:
            copy_tensor(output, name)
        if error is not None:
            raise error


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; of the manifest only what does not change from run to run."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if MANIFEST in found:
        manifest = json.loads(found[MANIFEST])
        del manifest["times"], manifest["seal"]
        found[MANIFEST] = json.dumps(manifest).encode()
    return found


def test_a_pass_through_copy_has_the_same_bytes_under_the_same_names(pair: Plan) -> None:
    assert run(pair) == list(pair.aligned.tensors)
    result, source = content(pair.out), content(pair.aligned.folder)
    assert result.keys() == source.keys() | {MANIFEST}
    rewritten = {MANIFEST, INDEX, "README.md"}
    assert {name: data for name, data in result.items() if name not in rewritten} == {
        name: data for name, data in source.items() if name not in rewritten
    }
    for shard in pair.aligned.shards:
        assert load_file(pair.out / shard.name).keys() == {tensor.name for tensor in shard.tensors}


def test_links_are_followed_and_what_may_be_executed_still_may(pair: Plan) -> None:
    run(pair)
    assert not (pair.out / "code" / "link.txt").is_symlink()
    assert os.access(pair.out / "code" / "run.sh", os.X_OK)
    assert (pair.out / "config.json").stat().st_mode & 0o111 == 0


def test_the_index_keeps_what_it_says_and_counts_the_bytes(tmp_path: Path) -> None:
    make(tmp_path / "base", TWO)
    make(tmp_path / "aligned", TWO)
    run(plan_of(tmp_path))
    index = json.loads((tmp_path / "out" / INDEX).read_bytes())
    assert index["metadata"] == {"total_size": 4 * (15 + 7 + 16 + 8), "total_parameters": 38}
    assert index["weight_map"] == json.loads((tmp_path / "aligned" / INDEX).read_bytes())["weight_map"]


def test_golden_bytes_of_a_tiny_shard(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4]}}'
    golden = (len(header)).to_bytes(8, "little") + header + b"\x01\x02\xfe\xff"
    for side in ("base", "aligned"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "model.safetensors").write_bytes(golden)
    run(plan_of(tmp_path))
    assert (tmp_path / "out" / "model.safetensors").read_bytes().hex() == (
        "37000000000000007b2277223a7b226474797065223a225538222c227368617065223a5b322c325d2c22646174615f6f66667365747322"
        "3a5b302c345d7d7d0102feff"
    )
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_bytes())
    assert manifest["tensors"]["w"]["xxh3_128"] == xxhash.xxh3_128_hexdigest(b"\x01\x02\xfe\xff")


def test_a_shard_without_tensors_is_copied(tmp_path: Path) -> None:
    shards = {"model-00001-of-00002.safetensors": {"a": (2, 2)}, "model-00002-of-00002.safetensors": {}}
    for side in ("base", "aligned"):
        make(tmp_path / side, shards)
        index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (tmp_path / side / INDEX).write_text(json.dumps(index))
    plan = plan_of(tmp_path)
    run(plan)
    for shard in plan.aligned.shards:
        assert (plan.out / shard.name).read_bytes() == shard.path.read_bytes()


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, so none has to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)


class Killed(BaseException):
    """Stands for the end of the process: after it no call reaches the disk."""


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> Callable[[], int]:
    """Let the process 'die' before the moment-th call that changes names or syncs; returns the count of calls."""
    calls = itertools.count()
    last = [0]

    def mortal(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            last[0] = next(calls)
            if last[0] >= moment:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "fdatasync", "unlink", "posix_fallocate", "pwrite", "mkdir", "ftruncate"):
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))
    return lambda: last[0] + 1


def assert_nothing_false_is_shown(plan: Plan, old: dict[str, bytes] | None = None) -> None:
    """An index or a manifest stands only over weights that are whole and of one run."""
    shown = content(plan.out) if plan.out.is_dir() else {}
    expected = {shard.name: shard.path.read_bytes() for shard in plan.aligned.shards}
    weights = {name: shown.get(name) for name in expected}
    allowed = [expected] if old is None else [expected, {name: old[name] for name in expected}]
    if INDEX in shown or MANIFEST in shown:
        assert weights in allowed
    for name, data in weights.items():
        assert data is None or data in [version[name] for version in allowed]


@pytest.mark.parametrize("shards", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_a_crash_at_any_step_shows_nothing_false_and_can_be_resumed(
    tmp_path: Path, shards: dict[str, dict[str, tuple[int, ...]]], overwrite: bool
) -> None:
    make(tmp_path / "base", shards, seed=1)
    make(tmp_path / "aligned", shards, seed=2)
    run(plan_of(tmp_path, "whole"))
    whole = content(tmp_path / "whole")
    for moment in itertools.count():
        plan, old = plan_of(tmp_path, f"out{moment}"), None
        if overwrite:
            run(plan)
            name = plan.aligned.shards[0].name
            (plan.out / name).write_bytes(b"old" + (plan.out / name).read_bytes()[3:])
            old = content(plan.out)
        with pytest.MonkeyPatch.context() as patch:
            steps = kill_at(patch, moment)
            try:
                run(plan, overwrite=overwrite)
                break
            except Killed:
                assert steps() > moment
        assert_nothing_false_is_shown(plan, old)
        if (plan.out / JOURNAL).exists() or (not overwrite and not (plan.out / MANIFEST).exists()):
            run(plan, resume=True)
        elif overwrite:  # died before anything was withdrawn, or after everything was there
            assert content(plan.out).keys() - {f"{JOURNAL}.partial"} == whole.keys()
            run(plan, overwrite=True)
        assert content(plan.out) == whole, moment
    assert moment > 20


def weights_in(shown: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in shown.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(("old", "new"), [(ONE, TWO), (TWO, ONE)], ids=["one-two", "two-one"])
def test_a_crash_while_another_layout_is_replaced_leaves_no_weights_of_it(
    tmp_path: Path, old: dict[str, dict[str, tuple[int, ...]]], new: dict[str, dict[str, tuple[int, ...]]]
) -> None:
    for folder, shards in (("earlier", old), ("new", new)):
        make(tmp_path / folder / "base", shards, seed=1)
        make(tmp_path / folder / "aligned", shards, seed=2)
    earlier, plan = plan_of(tmp_path / "earlier", "../out"), plan_of(tmp_path / "new", "../out")
    run(earlier)
    before = content(plan.out)
    shutil.rmtree(plan.out)
    run(plan)
    whole = content(plan.out)
    for moment in itertools.count():
        shutil.rmtree(plan.out)
        run(earlier)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment)
            try:
                run(plan, overwrite=True)
                break
            except Killed:
                pass
        shown = content(plan.out)
        if INDEX in shown:
            assert weights_in(shown) in (weights_in(before), weights_in(whole))
        if JOURNAL not in shown:
            assert {name: shown[name] for name in shown.keys() - {f"{JOURNAL}.partial"}} in (before, whole)
        run(plan, resume=(plan.out / JOURNAL).exists(), overwrite=not (plan.out / JOURNAL).exists())
        assert content(plan.out) == whole, moment
    assert content(plan.out) == whole
    assert moment > 20


def test_an_exception_leaves_partial_files_a_journal_and_no_index(pair: Plan) -> None:
    with pytest.raises(ZeroDivisionError):
        start(pair, "a", error=ZeroDivisionError())
    names = set(content(pair.out))
    assert names == {JOURNAL, *(f"{shard.name}.partial" for shard in pair.aligned.shards)}
    assert run(pair, resume=True) == [name for name in pair.aligned.tensors if name != "a"]


def test_a_run_that_ends_without_publishing_can_be_resumed(pair: Plan) -> None:
    start(pair, "b")
    assert run(pair, resume=True) == [name for name in pair.aligned.tensors if name != "b"]


def test_resume_in_a_folder_that_does_not_exist_starts(pair: Plan) -> None:
    assert run(pair, resume=True) == list(pair.aligned.tensors)


def test_missing_parents_of_the_output_are_made(tmp_path: Path) -> None:
    make(tmp_path / "base", ONE)
    make(tmp_path / "aligned", ONE)
    plan = plan_of(tmp_path, "x/y/ü z")
    run(plan)
    assert (tmp_path / "x" / "y" / "ü z" / MANIFEST).exists()


def test_a_finished_folder_is_not_resumed(pair: Plan) -> None:
    run(pair)
    with pytest.raises(ResumeError, match="is finished, there is nothing to resume"):
        run(pair, resume=True)


def test_a_folder_with_a_result_is_not_begun_again(pair: Plan) -> None:
    run(pair)
    before = content(pair.out)
    with pytest.raises(OutputError, match=r"already holds .* --resume .* --overwrite"):
        run(pair)
    assert content(pair.out) == before


def test_a_partial_file_that_was_deleted_is_made_again(pair: Plan) -> None:
    start(pair, *pair.aligned.tensors)
    shard = pair.aligned.shards[0]
    files.partial(pair.out / shard.name).unlink()
    assert run(pair, resume=True) == [tensor.name for tensor in shard.tensors]
    assert (pair.out / shard.name).read_bytes() == shard.path.read_bytes()


def test_a_resume_does_not_take_the_old_output_for_the_new_one(pair: Plan) -> None:
    run(pair)
    for shard in pair.aligned.shards:
        (pair.out / shard.name).write_bytes(shard.header + b"old" + shard.path.read_bytes()[len(shard.header) + 3 :])
    with Output(pair, overwrite=True) as output:
        for name in pair.aligned.tensors:
            copy_tensor(output, name)
    for shard in pair.aligned.shards:  # all tensors have their records; a folder that was not synced lost the files
        files.partial(pair.out / shard.name).unlink()
    assert run(pair, resume=True) == list(pair.aligned.tensors)
    for shard in pair.aligned.shards:
        assert (pair.out / shard.name).read_bytes() == shard.path.read_bytes()


def test_the_names_of_the_partial_files_are_synced_before_any_record(
    pair: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    make, sync, append = os.open, files.sync_folder, committer.Journal.append

    def opening(path: Path, flags: int, *mode: int) -> int:
        events.append(Path(path).name)
        return make(path, flags, *mode)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(files, "sync_folder", lambda path: (sync(path), events.append("synced")))
    monkeypatch.setattr(committer.Journal, "append", lambda *args: (events.append("record"), append(*args)))
    run(pair)
    begun = [events.index(files.partial(pair.out / shard.name).name) for shard in pair.aligned.shards]
    assert "synced" in events[max(begun) : events.index("record")]


@pytest.mark.parametrize("damage", [lambda data: b"\x00" * len(data), lambda data: data[:-1]], ids=["header", "size"])
def test_a_partial_file_that_is_not_the_journals_is_made_again(pair: Plan, damage: Callable[[bytes], bytes]) -> None:
    start(pair, *pair.aligned.tensors)
    shard = pair.aligned.shards[0]
    path = files.partial(pair.out / shard.name)
    path.write_bytes(damage(path.read_bytes()))
    assert run(pair, resume=True) == [tensor.name for tensor in shard.tensors]
    assert (pair.out / shard.name).read_bytes() == shard.path.read_bytes()


def test_a_record_of_a_deleted_partial_file_is_not_believed_later(pair: Plan) -> None:
    start(pair, *pair.aligned.tensors)
    files.partial(pair.out / pair.aligned.shards[0].name).unlink()
    with Output(pair, resume=True):
        pass  # killed again before anything was done: the file is there now, and empty
    run(pair, resume=True)
    for shard in pair.aligned.shards:
        assert (pair.out / shard.name).read_bytes() == shard.path.read_bytes()


def test_overwrite_withdraws_the_old_result_first_and_keeps_its_weights_to_the_end(pair: Plan) -> None:
    run(pair)
    (pair.out / "notes.txt").write_text("mine")
    weights = {shard.name for shard in pair.aligned.shards}
    with Output(pair, overwrite=True) as output:
        assert not {INDEX, MANIFEST} & content(pair.out).keys()
        assert weights <= content(pair.out).keys()
        copy_all(output)
    assert (pair.out / "notes.txt").read_text() == "mine"
    assert (pair.out / MANIFEST).exists()


def test_a_second_process_is_told_by_which_one_the_folder_is_written(pair: Plan) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_writer as t; from pathlib import Path\n"
        "with t.Output(t.plan_of(Path(sys.argv[2]))): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(pair.out.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "locked\n"
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match=rf"is being written by process {first.pid} on "):
                run(pair, **flags)
        first.stdin.close()
    assert first.returncode == 0
    run(pair, resume=True)


def test_a_killed_process_leaves_what_it_journalled(pair: Plan) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_writer as t; from pathlib import Path\n"
        "t.committer.BATCH_BYTES = 1\n"
        "with t.Output(t.plan_of(Path(sys.argv[2]))) as output:\n"
        "    t.copy_tensor(output, 'a'); sys.stdin.readline(); t.copy_tensor(output, 'b')\n"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(pair.out.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        waiting = threading.Event()
        for _ in range(1000):
            state = replay(pair.out) if pair.out.is_dir() else None
            if state is not None and "a" in state.finished:
                break
            waiting.wait(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert "a" not in run(pair, resume=True)
    for shard in pair.aligned.shards:
        assert (pair.out / shard.name).read_bytes() == shard.path.read_bytes()


def test_other_options_are_refused_by_name_and_nothing_is_touched(pair: Plan) -> None:
    start(pair, "a")
    before = content(pair.out)
    other = plan_of(pair.out.parent, options=Options(alpha=0.5, skip=("x*",), threads=7))
    with pytest.raises(ResumeError, match=r"(?s)--alpha is 0\.5, the run began with 1\.25.*--skip is \['x\*'\]"):
        run(other, resume=True)
    assert content(pair.out) == before


def test_threads_memory_and_the_name_of_the_cpu_are_free_on_resume(pair: Plan) -> None:
    start(pair, "a")
    free = Options(threads=3, memory_bytes=1 << 30, device="cpu")
    assert "a" not in run(plan_of(pair.out.parent, options=free), resume=True)


def test_a_run_does_not_go_on_where_other_sums_are_taken(pair: Plan) -> None:
    start(pair, "a")
    with pytest.raises(ResumeError, match="--device is 'cuda', the run began with 'cpu'"):
        run(plan_of(pair.out.parent, options=Options(device="cuda:1")), resume=True)


def test_a_dry_run_of_a_resume_predicts_what_is_left_and_refuses_what_a_resume_would(pair: Plan) -> None:
    start(pair, "a")
    before = content(pair.out)
    paths = [f"--{side}={pair.out.parent / side}" for side in ("base", "aligned", "out")]
    given = ["run", *paths, "--resume", "--dry-run", "--json"]
    found = json.loads(CliRunner().invoke(commands, given).stdout)["prediction"]
    assert found["written_bytes"] == sum(t.n_bytes for t in pair.aligned.tensors.values() if t.name != "a")
    refused = CliRunner().invoke(commands, [*given, "--rank", "9"])
    assert refused.exit_code == 1
    assert "--rank is 9, the run began with 6" in refused.stderr
    assert content(pair.out) == before


def test_other_inputs_are_refused_and_a_changed_time_only_warns(pair: Plan) -> None:
    start(pair, "a")
    shard = pair.base.shards[0]
    os.utime(shard.path, ns=(1, 1))
    with Output(plan_of(pair.out.parent), resume=True) as output:
        assert output.warnings == [f"base {shard.name}: was modified since the run began; size and header are the same"]
    data = shard.path.read_bytes()
    shard.path.write_bytes(data.replace(b'"format":"pt"', b'"format":"PT"'))
    with pytest.raises(ResumeError, match=rf"base {shard.name}: not the file .*header differ"):
        run(plan_of(pair.out.parent), resume=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_an_error_before_the_work_and_leaves_nothing(tmp_path: Path, small_disk: Path) -> None:
    for side in ("base", "aligned"):
        make(tmp_path / side, {"model.safetensors": {"a": (200, 100)}})
    plan = plan_of(tmp_path, "disk/out")
    with pytest.raises(OutputError, match=r"cannot reserve 80,\d+ bytes: No space left on device\. Free some space"):
        run(plan)
    assert content(plan.out) == {}


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_at_the_end_can_be_resumed(tmp_path: Path, small_disk: Path) -> None:
    for side in ("base", "aligned"):
        make(tmp_path / side, {"model.safetensors": {"a": (40, 100)}})
    plan = plan_of(tmp_path, "disk/out")
    hog = small_disk / "hog"
    start(plan, "a")
    fill(hog)
    with pytest.raises(OutputError, match="No space left on device"):
        run(plan, resume=True)
    assert MANIFEST not in content(plan.out)
    hog.unlink()
    assert run(plan, resume=True) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_reservation_that_fails_is_explained(pair: Plan, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OutputError, match=f"cannot reserve .* bytes: {os.strerror(code)}. Free some space"):
        run(pair)
    assert content(pair.out) == {}


def test_a_limit_on_the_size_of_files_is_found_before_the_work(pair: Plan) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OutputError, match="File too large"):
            run(pair)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_error_while_writing_says_where_and_can_be_resumed(pair: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def fail(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    start(pair, "a")
    with Output(pair, resume=True) as output:
        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(OutputError, match=r"partial: cannot write: Input/output error\. .* --resume"):
            copy_tensor(output, "b")
    monkeypatch.setattr(os, "pwrite", real)
    assert "a" not in run(pair, resume=True)


def test_an_error_of_the_committing_thread_reaches_the_working_ones(
    pair: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(committer, "BATCH_BYTES", 1)
    output = Output(pair).__enter__()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        copy_tensor(output, "a")
        output._committer._thread.join(timeout=10)
        with pytest.raises(OutputError, match="cannot sync: Input/output error"):
            copy_tensor(output, "b")
    with pytest.raises(OutputError, match="cannot sync: Input/output error"):
        output.__exit__(None, None, None)
    assert replay(pair.out).finished == {}
    assert run(pair, resume=True) == list(pair.aligned.tensors)


def test_an_error_of_the_committing_thread_stops_the_publication(pair: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OutputError, match="cannot sync"):
        run(pair)
    assert set(content(pair.out)) == {JOURNAL, *(f"{shard.name}.partial" for shard in pair.aligned.shards)}


def test_a_record_is_written_only_after_the_bytes_were_synced(pair: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, append = os.fdatasync, committer.Journal.append

    def synced(fd: int) -> None:
        sync(fd)
        events.append(str(Path(f"/proc/self/fd/{fd}").readlink()))

    def appended(journal: committer.Journal, finished: list[TensorFacts]) -> None:
        for facts in finished:
            assert str(files.partial(pair.out / shard_of[facts.name])) in events
            events.append(facts.name)
        append(journal, finished)

    shard_of = {tensor.name: shard.name for shard in pair.aligned.shards for tensor in shard.tensors}
    monkeypatch.setattr(os, "fdatasync", synced)
    monkeypatch.setattr(committer.Journal, "append", appended)
    run(pair)
    assert set(shard_of) < set(events)


def test_a_slow_run_is_journalled_by_time(pair: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer, "BATCH_S", 0.01)
    with Output(pair) as output:
        copy_tensor(output, "a")
        for _ in range(500):
            if "a" in replay(pair.out).finished:
                break
            threading.Event().wait(0.01)
        assert "a" in replay(pair.out).finished


def test_a_run_that_is_stopped_does_not_wait_for_a_large_sync(pair: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer, "STOP_BYTES", 10)
    with pytest.raises(Cancelled):
        start(pair, "a", error=Cancelled())
    assert replay(pair.out).finished == {}
    assert run(pair, resume=True) == list(pair.aligned.tensors)


def test_work_waits_while_the_disk_is_two_batches_behind(pair: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer, "BATCH_BYTES", 20)
    disk, real = threading.Event(), os.fdatasync

    def slow(fd: int) -> None:
        assert disk.wait(10)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    with Output(pair) as output, ThreadPoolExecutor(1) as pool:
        copy_tensor(output, "a")  # 60 bytes
        second = pool.submit(copy_tensor, output, "b")
        with pytest.raises(TimeoutError):
            second.result(timeout=0.05)
        disk.set()
        second.result(timeout=10)


@pytest.mark.parametrize("lacking", ["posix_fallocate", "fdatasync", "posix_fadvise"])
def test_what_macos_lacks_is_left_out(pair: Plan, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    monkeypatch.delattr(os, lacking)
    run(pair)
    for shard in pair.aligned.shards:
        assert (pair.out / shard.name).read_bytes() == shard.path.read_bytes()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_reserve_is_written_to(
    pair: Plan, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    run(pair)
    assert (pair.out / MANIFEST).exists()


def test_space_is_reserved_for_the_whole_file(pair: Plan) -> None:
    with Output(pair):
        for shard in pair.aligned.shards:
            status = files.partial(pair.out / shard.name).stat()
            assert status.st_size == shard.size_bytes <= 512 * status.st_blocks


def place_of(path: Path, n_bytes: int) -> Place:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 5 + n_bytes)
    return Place(fd, path, 5, n_bytes)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=8), seed=st.integers(0, 999))
def test_the_checksum_does_not_depend_on_the_order_of_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int], seed: int
) -> None:
    place = place_of(tmp_path_factory.mktemp("place") / "file", len(data))
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = list(itertools.pairwise(edges))
    random.Random(seed).shuffle(pieces)
    for begin, end in pieces:
        place.write(begin, data[begin:end])
    assert place.checksum() == xxhash.xxh3_128_hexdigest(data)
    assert os.pread(place.fd, 1000, 5) == data
    os.close(place.fd)


def test_several_threads_write_one_tensor(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3_000_001)
    place = place_of(tmp_path / "file", len(data))
    offsets = range(0, len(data), 7919)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda offset: place.write(offset, memoryview(data)[offset : offset + 7919]), offsets))
    assert place.checksum() == xxhash.xxh3_128_hexdigest(data)
    assert (tmp_path / "file").read_bytes()[5:] == data
    os.close(place.fd)


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset))
    place = place_of(tmp_path / "file", 100)
    place.write(0, np.arange(25, dtype=np.int32).reshape(5, 5))
    assert (tmp_path / "file").read_bytes()[5:] == np.arange(25, dtype=np.int32).tobytes()
    os.close(place.fd)


def test_one_call_moves_no_more_than_the_system_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = os.pwrite
    monkeypatch.setattr(files, "CALL_BYTES", 64)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: sizes.append(len(data)) or real(fd, data, offset))
    place = place_of(tmp_path / "file", 150)
    place.write(0, bytes(150))
    assert sizes == [64, 64, 22]
    os.close(place.fd)


def test_a_tensor_that_is_not_whole_has_no_checksum(tmp_path: Path) -> None:
    place = place_of(tmp_path / "file", 10)
    place.write(5, bytes(5))
    with pytest.raises(AssertionError, match="0 of 10 bytes"):
        place.checksum()
    with pytest.raises(AssertionError, match="written twice"):
        place.write(5, bytes(5))
    os.close(place.fd)


def test_a_companion_that_changes_before_it_is_copied_ends_the_run(pair: Plan) -> None:
    script = pair.aligned.folder / "code" / "run.sh"
    with Output(pair) as output:
        for name in pair.aligned.tensors:
            copy_tensor(output, name)
        documents = written_documents(pair, output.finished, elapsed_s=1.0)
        script.write_text("another")
        with pytest.raises(OutputError, match=r"run\.sh: was modified while the result was published\. .* --resume"):
            output.publish(documents)
    assert MANIFEST not in content(pair.out)
    assert run(pair, resume=True) == []
    assert content(pair.out)["code/run.sh"] == b"another"


def test_an_error_of_closing_hides_no_other_one(pair: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    closing = os.close
    output = Output(pair).__enter__()
    monkeypatch.setattr(os, "close", lambda fd: (closing(fd), fail()))
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OutputError, match="partial: cannot write: Input/output error") as raised:
        copy_tensor(output, "a")
    output.__exit__(OutputError, raised.value, None)
    monkeypatch.undo()
    run(pair, resume=True)


def test_what_was_computed_when_an_input_had_changed_is_not_recorded(
    pair: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "BATCH_BYTES", 1)
    path = pair.base.shards[0].path
    before = path.stat()
    with Output(pair) as output:
        copy_tensor(output, "a")
        for _ in range(500):
            if "a" in replay(pair.out).finished:
                break
            threading.Event().wait(0.01)
        os.utime(path, ns=(1, 1))
        copy_tensor(output, "b")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # put back as it was, by whoever noticed
    assert set(replay(pair.out).finished) == {"a"}
    assert "b" in run(pair, resume=True)
