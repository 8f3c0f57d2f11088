"""Models that lie elsewhere, passing through a folder that holds what is in work: against files served by functions."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from pathlib import Path

import folders
import pytest
import torch

from lox_stream import CheckpointError, DataError, Options, OutputError, anywhere, plan, remote
from lox_stream.api import execute_all
from lox_stream.pipeline import jobs_for
from lox_stream.reaching import as_given, reach
from lox_stream.remote import RemoteFile
from lox_stream.scratch_disk import MARKER, PREFIX, Scratch, scratch_at
from lox_stream.synthetic import llama_shapes, write_pair

SHAPES = llama_shapes(64, 96, 6, 512, 32)
LARGE = 70_000  # bytes, of a range: a shard, and not a header or a sample
OPTIONS = Options(threads=2, memory_bytes=1 << 28)


class Server:
    """Files of a folder; counts how often it gives a whole one, and misbehaves by `faults`: what comes of a range."""

    def __init__(self, folder: Path, *, promise: str = "sha256") -> None:
        self.folder, self.promise = folder, promise
        self.whole: Counter[str] = Counter()  # how often a shard was fetched
        self.faults: dict[str, list] = {}
        self.lock = threading.Lock()

    def files(self) -> list[RemoteFile]:
        return [self.file(path) for path in sorted(self.folder.iterdir())]

    def file(self, path: Path) -> RemoteFile:
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest() if self.promise == "sha256" else ""
        etag = {"md5": hashlib.md5(data).hexdigest(), "parts": parts_tag(data, 8 << 20)}.get(self.promise, self.promise)
        etag = "" if self.promise == "sha256" else etag

        def fetch(start: int, end: int) -> bytes:
            with self.lock:
                self.whole[path.name] += end - start > LARGE
                fault = self.faults[path.name].pop(0) if self.faults.get(path.name) and end - start > LARGE else None
            if isinstance(fault, Exception):
                raise fault
            return fault(data[start:end]) if fault else data[start:end]

        return RemoteFile(path.name, f"test://host/{path.name}", len(data), fetch, 10**18, sha256, etag)


def parts_tag(data: bytes, size: int) -> str:
    digests = [hashlib.md5(data[at : at + size]).digest() for at in range(0, len(data), size)]
    return f"{hashlib.md5(b''.join(digests)).hexdigest()}-{len(digests)}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base, aligned = write_pair(folder, SHAPES, aligned_shards=4)
    return base, aligned


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def run_through(scratch: Scratch, base, aligned, out: Path, **more):
    """A run whose inputs are servers, or folders."""
    folders = [
        scratch.lay_out(side, given.files(), dry=False) if isinstance(given, Server) else given
        for side, given in (("base", base), ("aligned", aligned))
    ]
    made = plan(*folders, out, options=OPTIONS, **more)
    (summary,) = execute_all([made], **more, source=scratch)
    return summary


@pytest.fixture(scope="module")
def right(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("right") / "out"
    anywhere.extrapolate(*pair, out, options=OPTIONS)
    return weights(out)


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("promise", ["sha256", "md5", "parts", ""])
def test_a_pair_passes_through_with_the_bytes_of_one_that_lies_here(pair, right, tmp_path, promise):
    base, aligned = (Server(folder, promise=promise) for folder in pair)
    with Scratch(tmp_path / "scratch", 1 << 30) as scratch:
        summary = run_through(scratch, base, aligned, tmp_path / "out")
    assert weights(tmp_path / "out") == right
    assert summary.warnings == ()
    assert list((tmp_path / "scratch").iterdir()) == [], "nothing is left"
    assert {*aligned.whole.values()} <= {0, 1}, "each shard is fetched once"


class Watched(Scratch):
    """Counts what lies there at once."""

    most = 0

    def _fetch(self, path):
        super()._fetch(path)
        found = [file.stat() for side in ("base", "aligned") for file in (self.root / side).glob("*.safetensors*")]
        self.most = max(self.most, sum(one.st_size for one in found if one.st_nlink == 1))  # a hole has two names


def test_it_never_holds_more_than_it_may(pair, right, tmp_path):
    """And less than the two models: the base is one file, and of aligned one of four has room beside it."""
    base, aligned = map(Server, pair)
    largest = max(path.stat().st_size for path in pair[1].glob("*.safetensors"))
    beside = sum(path.stat().st_size for folder in pair for path in folder.glob("*.json"))
    capacity = total(pair[0]) + largest + beside
    with Watched(tmp_path / "scratch", capacity) as scratch:
        run_through(scratch, base, aligned, tmp_path / "out")
    assert total(pair[0]) < scratch.most <= capacity
    assert weights(tmp_path / "out") == right


def test_what_is_needed_last_makes_room(tmp_path, right, pair):
    """Two sides in files that do not match: base's shards are fetched again where they have to be, and no job waits."""
    other = tmp_path / "other"
    anywhere.extrapolate(pair[0], pair[1], other, options=Options(alpha=0.0, max_shard_size=150_000))
    base, aligned = Server(pair[0]), Server(other)
    shards = sorted(path.stat().st_size for path in other.glob("*.safetensors"))
    with Scratch(tmp_path / "scratch", total(pair[0]) + 2 * shards[-1]) as scratch:
        run_through(scratch, base, aligned, tmp_path / "out")
    anywhere.extrapolate(pair[0], other, tmp_path / "here", options=OPTIONS)
    assert weights(tmp_path / "out") == weights(tmp_path / "here")
    assert base.whole["model.safetensors"] == 1, "what every job needs is not dropped"


def test_too_small_a_scratch_is_said_before_anything_is_written(pair, tmp_path):
    base, aligned = map(Server, pair)
    with Scratch(tmp_path / "scratch", total(pair[0])) as scratch, pytest.raises(OutputError, match="--scratch-size"):
        run_through(scratch, base, aligned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="are free there"), scratch_at(tmp_path, 1 << 60):
        pass


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize(
    "faults",
    [
        [ConnectionError("cut")] * 3,
        [lambda data: data[:-5]] * 2,
        [lambda data: data + b"x"],
        [flipped],
    ],
    ids=["cut", "short", "long", "flipped"],
)
def test_faults_that_pass_change_nothing(pair, right, tmp_path, quick, faults):
    base, aligned = map(Server, pair)
    base.faults["model.safetensors"] = list(faults)
    aligned.faults["model-00002-of-00004.safetensors"] = list(faults)
    with Scratch(tmp_path / "scratch", 1 << 30) as scratch:
        run_through(scratch, base, aligned, tmp_path / "out")
    assert weights(tmp_path / "out") == right


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ([ConnectionError("refused")] * 99, "cannot be read at byte 0: refused"),
        ([lambda data: data[:-5]] * 99, "bytes came, expected"),
        ([flipped] * 99, "its bytes are not what was promised"),
        ([CheckpointError(["test://x: was modified"])], "was modified"),
    ],
    ids=["cut", "short", "flipped", "modified"],
)
def test_faults_that_stay_end_the_run_which_goes_on_later(pair, right, tmp_path, quick, faults, said):
    base, aligned = map(Server, pair)
    name = "model-00003-of-00004.safetensors"
    aligned.faults[name] = list(faults)
    out = tmp_path / "out"
    small = total(pair[0]) + 2 * max(path.stat().st_size for path in pair[1].glob("*.safetensors"))
    with Scratch(tmp_path / "scratch", small) as scratch, pytest.raises(DataError, match=said) as caught:
        run_through(scratch, base, aligned, out)
    assert "--resume goes on" in str(caught.value)
    assert weights(out) == {}
    aligned.faults = {}
    with Scratch(tmp_path / "scratch", small) as scratch:
        run_through(scratch, base, aligned, out, resume=True)
    assert weights(out) == right


def test_an_etag_that_is_no_checksum_is_found_out_once(pair, right, tmp_path):
    base, aligned = Server(pair[0]), Server(pair[1], promise="0" * 32)
    with Scratch(tmp_path / "scratch", 1 << 30) as scratch:
        summary = run_through(scratch, base, aligned, tmp_path / "out")
    assert weights(tmp_path / "out") == right
    assert len([warning for warning in summary.warnings if "its ETag is no checksum" in warning]) == 1
    assert sorted(aligned.whole.values())[-4:] == [1, 1, 1, 2]


def test_what_a_killed_run_left_is_swept_and_what_is_in_use_is_not(tmp_path):
    left, mine = tmp_path / f"{PREFIX}of-a-killed-run", tmp_path / f"{PREFIX}that-is-none"
    for folder in (left, mine):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(100))
    (left / MARKER).touch()
    with Scratch(tmp_path, 1000) as one, Scratch(tmp_path, 1000) as other:
        assert not left.exists()
        assert one.root.is_dir()
        assert other.root.is_dir()
    assert list(tmp_path.iterdir()) == [mine], "what has no marker is nobody's to remove"


def test_a_name_that_leads_elsewhere_is_refused():
    strange = RemoteFile("../../etc/passwd", "test://x/../../etc/passwd", 3, lambda start, end: b"abc")
    with pytest.raises(CheckpointError, match="no plain name within the model"):
        remote.wanted([strange])


def test_stopping_leaves_no_thread_and_no_file(pair, tmp_path):
    base, aligned = map(Server, pair)
    cancel, before = threading.Event(), threading.active_count()
    with Scratch(tmp_path / "scratch", 1 << 30) as scratch:
        folders = [scratch.lay_out(name, one.files(), dry=False) for name, one in (("b", base), ("a", aligned))]
        made = plan(*folders, tmp_path / "out", options=OPTIONS)
        cancel.set()
        with pytest.raises(Exception, match="stopped"):
            execute_all([made], cancel=cancel, source=scratch)
    assert threading.active_count() == before
    assert list((tmp_path / "scratch").iterdir()) == []


def test_jobs_that_were_told_before_keep_their_turn(pair, tmp_path):
    base, aligned = map(Server, pair)
    with Scratch(tmp_path / "scratch", 1 << 30) as scratch:
        folders = [scratch.lay_out(name, one.files(), dry=False) for name, one in (("b", base), ("a", aligned))]
        jobs = jobs_for(plan(*folders, options=OPTIONS))
        scratch.expect(jobs)
        scratch.expect(jobs[::-1])
        for job in jobs:
            scratch.need(job, lambda: False)
            scratch.done(job)
        assert scratch.fetched_bytes == total(pair[0]) + total(pair[1])


def test_paths_here_need_no_scratch(pair):
    reached = reach(*pair, None)
    assert (reached.base, reached.aligned, reached.given) == (*pair, ("", ""))
    made = plan(*pair)
    assert as_given(made, reached) == made


@pytest.mark.parametrize("dry", [True, False])
def test_what_a_plan_reads_beyond_headers_is_what_it_would_read_here(dry, tmp_path):
    """Ties by bytes, and padding: holes would make everything equal, and every row of base padding."""
    random = torch.Generator().manual_seed(0)
    table, other = (torch.randn(3000, 256, generator=random) for _ in range(2))
    padded = torch.cat([table, torch.zeros(100, 256)])
    rest = {"model.layers.0.up.weight": torch.randn(40, 40, generator=random)}
    base = folders.write(tmp_path / "base", {"embed": padded, "head": padded.clone(), "own": table, **rest})
    grown = torch.cat([table + 0.01, other[:200]])
    aligned = folders.write(tmp_path / "aligned", {"embed": grown, "head": grown.clone(), "own": other, **rest})
    options = Options(on_shape_mismatch="overlap")
    with Scratch(tmp_path / "scratch", 1 << 30) as scratch:
        sides = [scratch.lay_out(side.name, Server(side).files(), dry=dry) for side in (base, aligned)]
        found = [(one.name, one.seed_name, one.m, one.base.name) for one in plan(*sides, options=options).steps]
        assert all(side.stat().st_mtime_ns == 10**18 for side in (s / "model.safetensors" for s in sides))
    here = [(one.name, one.seed_name, one.m, one.base.name) for one in plan(base, aligned, options=options).steps]
    assert sorted(found) == sorted(here)
    assert ("head", "embed", 3000, "embed") in here
    assert ("own", "own", 3000, "own") in here
