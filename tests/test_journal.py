"""The journal: what it says can be believed, whatever the moment at which its writer died."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lox_stream import journal
from lox_stream.errors import DataError, ResumeError
from lox_stream.facts import MatrixFacts, TensorFacts
from lox_stream.journal import FORMAT, Journal, Replay, finite, replay, tensor_facts
from lox_stream.output_rules import JOURNAL
from lox_stream.resuming import differences
from lox_stream.shards import read_shard

MATRIX = MatrixFacts(
    delta_norm=0.1 + 0.2,
    weight_norm=1e-300,
    update_norm=1 / 3,
    retention=0.75,
    method="krylov",
    singular_values=(3.0, 1e30),
    radius=(1e-7, 2e-7),
    energy=0.5,
    residual=1e-6,
    passes=8,
    gap=0.05,
)
FACTS = TensorFacts("layers.0.wëight\n", "extrapolate", "matrix", 32, 0.25, "00ff" * 8, (MATRIX,), ("a notice",))
COPY = TensorFacts("norm", "copy", "vector", 8, 0.0, "ab" * 16)
HEADER = {
    "format": FORMAT,
    "versions": {"lox-stream": "0.1.0", "torch": "2.13"},
    "options": {"rank": 6, "alpha": 1.25, "skip": []},
    "inputs": {side: {"model.safetensors": {"size": 9, "header": "aa", "mtime_ns": 5}} for side in ("base", "aligned")},
}
SESSION = {"session": 42, "host": "here", "time": "2026-01-01T00:00:00+00:00"}


def written(folder: Path) -> bytes:
    new = Journal(folder, Replay(HEADER, (SESSION,), {COPY.name: COPY}))
    new.append([FACTS])
    new.close()
    return (folder / JOURNAL).read_bytes()


def test_a_journal_says_what_was_written(tmp_path: Path) -> None:
    written(tmp_path)
    assert replay(tmp_path) == Replay(HEADER, (SESSION,), {COPY.name: COPY, FACTS.name: FACTS})
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL]


def test_a_record_is_on_the_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    path = tmp_path / JOURNAL
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(path.read_bytes() if path.exists() else b""))
    data = written(tmp_path)
    assert synced[-1] == data


def test_a_folder_without_a_journal_has_no_state(tmp_path: Path) -> None:
    assert replay(tmp_path) is None


def test_a_torn_line_is_ignored_wherever_it_was_torn(tmp_path: Path) -> None:
    data = written(tmp_path)
    begin = data[:-1].rindex(b"\n") + 1
    for end in range(begin, len(data)):
        (tmp_path / JOURNAL).write_bytes(data[:end])
        assert replay(tmp_path) == Replay(HEADER, (SESSION,), {COPY.name: COPY})


@pytest.mark.parametrize("garbage", [b"\0" * 100 + b"\n", b"\xff\xfe\n", b"[1, 2]\n", b"{}garbage\n"])
def test_what_follows_a_broken_line_is_done_again(tmp_path: Path, garbage: bytes) -> None:
    lines = written(tmp_path).splitlines(keepends=True)
    (tmp_path / JOURNAL).write_bytes(b"".join([*lines[:3], garbage, *lines[3:]]))
    assert replay(tmp_path).finished == {COPY.name: COPY}


def test_a_resumed_journal_holds_no_torn_line(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(written(tmp_path)[:-9])
    again = Journal(tmp_path, replay(tmp_path))
    again.append([FACTS])
    again.close()
    assert set(replay(tmp_path).finished) == {COPY.name, FACTS.name}


@pytest.mark.parametrize("data", [b"", b"not json\n", b'{"format": "x"}\n', b'{"session": 1}\n', b"[]\n"])
def test_a_file_that_is_no_journal_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / JOURNAL).write_bytes(data)
    with pytest.raises(ResumeError, match=r"is not a journal of lox-stream, or damaged\. Start again with --overwrite"):
        replay(tmp_path)


def test_a_record_with_missing_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(json.dumps(HEADER).encode() + b'\n{"tensor": {"name": "x"}}\n')
    with pytest.raises(ResumeError, match=r"damaged \('action' is missing\)"):
        replay(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(json.dumps(HEADER | {"format": FORMAT + 1}).encode() + b"\n")
    with pytest.raises(ResumeError, match=f"has format {FORMAT + 1}, this lox-stream reads up to {FORMAT}"):
        replay(tmp_path)


def test_numbers_that_json_cannot_hold_become_null_and_nan_again() -> None:
    facts = replace(FACTS, matrices=(replace(MATRIX, delta_norm=math.nan, singular_values=(math.inf,), gap=-math.inf),))
    record = json.loads(journal._line({"tensor": journal.asdict(facts)}))["tensor"]
    assert record["matrices"][0]["delta_norm"] is None
    matrix = tensor_facts(record).matrices[0]
    assert math.isnan(matrix.delta_norm)
    assert math.isnan(matrix.singular_values[0])
    assert matrix.gap is None
    assert replace(matrix, delta_norm=0.0, singular_values=()) == replace(
        MATRIX, delta_norm=0.0, singular_values=(), gap=None
    )


def test_finite_reaches_every_depth() -> None:
    assert finite({"a": [1.5, math.nan, (math.inf, "x", None, True)], 3: {"b": -math.inf}}) == {
        "a": [1.5, None, [None, "x", None, True]],
        "3": {"b": None},
    }


def changed(**parts: object) -> dict[str, object]:
    new = json.loads(json.dumps(HEADER))
    for path, value in parts.items():
        keys = path.split("__")
        place = new
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
    return new


FILE = "model.safetensors"


@pytest.mark.parametrize(
    ("new", "refused", "warned"),
    [
        (HEADER, [], []),
        (changed(options__rank=8), ["--rank is 8, the run began with 6"], []),
        (changed(options__skip=["x"]), ["--skip is ['x'], the run began with []"], []),
        (
            changed(versions__torch="3.0"),
            [],
            ["torch is 3.0, the run began with 2.13: the last bits may differ"],
        ),
        (
            changed(inputs__base={FILE: {"size": 9, "header": "aa", "mtime_ns": 6}}),
            [],
            [f"base {FILE}: was modified since the run began; size and header are the same"],
        ),
        (
            changed(inputs__aligned={FILE: {"size": 8, "header": "bb", "mtime_ns": 6}}),
            [f"aligned {FILE}: not the file that the run began with (size, header differ)"],
            [],
        ),
        (
            changed(inputs__base={f"{i}": {} for i in range(5)}),
            [f"base has the files 0, 1, 2, 3 and 1 more, the run began with {FILE}"],
            [],
        ),
    ],
)
def test_differences_are_named(new: dict[str, object], refused: list[str], warned: list[str]) -> None:
    assert differences(HEADER, new) == (refused, warned)


def test_a_sample_does_not_depend_on_how_much_a_read_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.arange(50_000, dtype=np.float32)}, path)
    shard = read_shard(path)
    whole, real = journal.sample_hash(shard), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n_bytes, offset: real(fd, min(n_bytes, 1000), offset))
    assert journal.sample_hash(shard) == whole


def test_a_sample_that_cannot_be_read_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.arange(50_000, dtype=np.float32)}, path)
    shard = read_shard(path)

    def fails(*args: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(DataError, match=f"{path}: cannot read it: Input/output error"):
        journal.sample_hash(shard)
