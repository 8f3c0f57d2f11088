"""Verifying a finished output: every byte against the checksums of its manifest."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lox_stream import files
from lox_stream.errors import CheckpointError
from lox_stream.layout import choose_layout
from lox_stream.manifest import joined, read_manifest, stamp_of
from lox_stream.names import is_plain_relative, listing, printable, shown
from lox_stream.output_rules import MANIFEST
from lox_stream.sealing import opened
from lox_stream.shards import is_regular, parse_json

DAMAGED = "It is not what was written: make it again with `run ... --resume --repair`, or restore it from a copy"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked."""

    name: str  # a tensor, or a file
    ok: bool
    message: str  # what is wrong, found, expected, way out; empty if nothing is
    n_bytes: int = 0  # read for it
    file: str = ""  # relative to the folder
    part: Literal["tensor", "header", "file"] = "file"
    first_byte: int = 0  # of the file: where the part begins


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor lies in its file, and the checksum that it should have."""

    name: str
    start: int
    n_bytes: int
    checksum: str


def verify_checksums(out: str | Path) -> Iterator[Check]:
    """Check the manifest, the files beside the weights, and of each shard its header and every tensor, and its size.

    `out` is the folder or its weight file. Yields as it goes, problems included. Reads every byte once, in pieces of
    1 MiB, and gives the page cache back. Raises OutputError when there is no manifest that can be read.
    """
    folder = folder_of(out)
    found = read_manifest(folder)
    yield from _seal(folder)
    beside = _value(found, "files")
    yield from check_files(folder, beside)
    index = _value(found, "index")
    if index is not None and not (isinstance(beside, dict) and isinstance(index, str) and index in beside):
        yield _index(folder, str(index), found["tensors"])
    yield from _loaded(folder, found["shards"])
    for name, said in found["shards"].items():
        rows = {tensor: row for tensor, row in found["tensors"].items() if _value(row, "shard") == name}
        yield from _shard(folder, name, said, rows)


def folder_of(out: str | Path) -> Path:
    """The folder of an output that was named by itself or by its weight file."""
    return Path(out) if Path(out).is_dir() else Path(out).parent


def _value(record: Any, key: str) -> Any:
    """What a manifest, which anybody may have edited, says under a key; None if it says nothing."""
    return record.get(key) if isinstance(record, dict) else None


def _failed(folder: Path, name: str, problem: str, way_out: str = DAMAGED) -> Check:
    return Check(name, False, f"{printable(folder / name)}: {problem}. {way_out}", file=name)


def _seal(folder: Path) -> Iterator[Check]:
    """The manifest against its own checksum, where it has one."""
    found = opened((folder / MANIFEST).read_bytes())
    if found.state == "whole":
        yield Check(MANIFEST, True, "", len(found.data), MANIFEST)
    elif found.state == "mended":
        problem = f"a bit of byte {found.at} is flipped, and read here as it was written"
        yield _failed(folder, MANIFEST, problem, "Put it right with `run ... --resume --repair`")
    else:
        problem = "was changed or damaged, or is none, so that what it says of the other files cannot be trusted"
        yield _failed(folder, MANIFEST, problem, "Restore it from a copy, or run again with --overwrite")


def _loaded(folder: Path, shards: Iterable[str]) -> Iterator[Check]:
    """What a loader takes for the model: nothing but the shards of the manifest."""
    parents: dict[str, set[str]] = {}
    for name in shards:
        parents.setdefault(name.rpartition("/")[0], set()).add(name.rpartition("/")[2])
    for parent, names in parents.items():
        if parent and not is_plain_relative(parent):
            continue
        try:
            others = {*choose_layout(folder / parent).shard_names} - names
        except CheckpointError:  # of files that are damaged, which are checked by themselves
            continue
        for name in sorted(name for name in others if (folder / parent / name).exists()):
            problem = f"is loaded beside or instead of the output, expected {listing(sorted(names))}"
            yield _failed(folder, f"{parent}/{name}".removeprefix("/"), problem, "Move it away")


def check_files(folder: Path, beside: Any) -> Iterator[Check]:
    """The files beside the weights: `{name: {"size": ..., "xxh3_128": ...}}` of a manifest."""
    for name, said in beside.items() if isinstance(beside, dict) else ():
        problem = _unusable(folder, name)
        if problem:
            yield _failed(folder, name, problem)
            continue
        try:
            found = stamp_of(folder / name)
        except OSError as error:
            yield _failed(folder, name, f"cannot be read: {error.strerror}")
            continue
        wrong = [
            f"{key} {found[key]}, expected {shown(_value(said, key))}"
            for key in found
            if found[key] != _value(said, key)
        ]
        if wrong:
            yield _failed(folder, name, f"found {' and '.join(wrong)}")
        else:
            yield Check(name, True, "", found["size"], name)


def _unusable(folder: Path, name: str) -> str:
    """Why a file that a manifest names cannot be looked at; nothing if it can."""
    if not is_plain_relative(name):
        return "is a name of the manifest that leads outside the folder"
    try:
        return "" if is_regular(folder / name) else "is a folder, device, pipe or socket, expected a file"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:  # such as a name that is too long
        return f"cannot be read: {error.strerror}"


def _index(folder: Path, name: str, tensors: dict[str, Any]) -> Check:
    """The index has to name every tensor of the manifest in its shard; for a manifest that has no checksum of it."""
    if problem := _unusable(folder, name):
        return _failed(folder, name, problem)
    try:
        weight_map = _value(parse_json((folder / name).read_bytes())[0], "weight_map")
    except (OSError, ValueError) as error:
        return _failed(folder, name, f"cannot be read: {error}")
    wrong = [tensor for tensor, row in tensors.items() if _value(weight_map, tensor) != _value(row, "shard")]
    if wrong:
        return _failed(folder, name, f"does not lead to {listing(wrong)}")
    return Check(name, True, "", file=name)


def _shard(folder: Path, name: str, said: Any, rows: dict[str, Any]) -> Iterator[Check]:
    """Header, size and tensors; where these lie follows from the manifest, whatever the header has become."""
    problem = _unusable(folder, name)
    sizes = [_value(row, "n_bytes") for row in rows.values()]
    size = _value(said, "size")
    if not problem and not all(type(n_bytes) is int and 0 <= n_bytes < 1 << 63 for n_bytes in (size, *sizes)):
        problem = "the manifest does not say how long it or its tensors are"
    elif not problem and size < sum(sizes):
        problem = f"the manifest says {size} bytes, and {sum(sizes)} of its tensors"
    if problem:
        yield _failed(folder, name, problem)
        return
    start = n_header = size - sum(sizes)
    spans = []
    for (tensor, row), n_bytes in zip(rows.items(), sizes, strict=True):
        spans.append(Span(tensor, start, n_bytes, str(_value(row, "xxh3_128"))))
        start += n_bytes
    yield from check_shard(folder, name, size, n_header, str(_value(said, "header_xxh3_128")), spans)
    if _joined(spans) != _value(said, "tensors_xxh3_128"):
        yield _failed(folder, name, "its tensors together differ from the manifest's checksum")


def _joined(spans: Iterable[Span]) -> str | None:
    """The checksum of the tensors' checksums; None if some of these are none."""
    try:
        return joined(span.checksum for span in spans)
    except ValueError:
        return None


def check_shard(
    folder: Path, name: str, size: int, n_header: int, header_hash: str, spans: Iterable[Span]
) -> Iterator[Check]:
    """One file of weights, of whatever name: its header of `n_header` bytes, its `size`, and its tensors."""
    path = folder / name
    try:
        with path.open("rb") as file:
            fd = file.fileno()
            found = files.checksum_of(fd, 0, n_header)
            if found != header_hash:
                problem = f"its header (bytes 0 to {n_header}) has xxh3_128 {found}, expected {printable(header_hash)}"
                yield Check(name, False, f"{printable(path)}: {problem}. {DAMAGED}", n_header, name, "header")
            else:
                yield Check(name, True, "", n_header, name, "header")
            if (found_size := os.fstat(fd).st_size) != size:
                yield _failed(folder, name, f"found {found_size} bytes, expected {size}")
            for span in spans:
                yield _tensor(fd, path, name, span)
    except OSError as error:
        yield _failed(folder, name, f"cannot be read: {error.strerror}")


def _tensor(fd: int, path: Path, file: str, span: Span) -> Check:
    found = files.checksum_of(fd, span.start, span.n_bytes)
    files.drop_cache(fd, span.start, max(1, span.n_bytes))
    message = ""
    if found != span.checksum:
        where = f"bytes {span.start} to {span.start + span.n_bytes} of the file"
        problem = f"{printable(span.name)} ({where}) has xxh3_128 {found}, expected {printable(span.checksum)}"
        message = f"{printable(path)}: {problem}. {DAMAGED}"
    return Check(span.name, not message, message, span.n_bytes, file, "tensor", span.start)
