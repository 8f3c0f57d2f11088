"""Verifying a finished output: every byte against the checksums of its manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from lox_stream import files
from lox_stream.manifest import joined, read_manifest
from lox_stream.names import is_plain_relative, listing, printable

DAMAGED = "It is not what was written: run again with --overwrite, or restore it from a copy"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked."""

    name: str  # a tensor, or a file
    ok: bool
    message: str  # what is wrong, found, expected, way out; empty if nothing is
    n_bytes: int = 0  # read for it


def verify_checksums(out: str | Path) -> Iterator[Check]:
    """Check the index, and of each shard its size, header and every tensor; yields as it goes, problems included.

    `out` is the folder or its weight file. Reads every byte once, in pieces of 1 MiB, and gives the page cache back.
    Raises OutputError when there is no manifest that can be read.
    """
    folder = Path(out) if Path(out).is_dir() else Path(out).parent
    found = read_manifest(folder)
    if found.get("index") is not None:
        yield _index(folder, str(found["index"]), found["tensors"])
    for name, said in found["shards"].items():
        rows = {tensor: row for tensor, row in found["tensors"].items() if _value(row, "shard") == name}
        try:
            yield from _shard(folder, name, said, rows)
        except OSError as error:
            yield Check(name, False, f"{folder / name}: cannot be read: {error.strerror}. {DAMAGED}")
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # its header's hash is right, and yet
            yield Check(name, False, f"{folder / name}: its header is none of safetensors': {error!r}. {DAMAGED}")


def _value(record: Any, key: str) -> Any:
    """What a manifest, which anybody may have edited, says under a key; None if it says nothing."""
    return record.get(key) if isinstance(record, dict) else None


def _index(folder: Path, name: str, tensors: dict[str, Any]) -> Check:
    """The index has to name every tensor of the manifest in its shard."""
    if not is_plain_relative(name):
        return Check(name, False, f"{folder}: the manifest names the index {printable(name)!r}, outside the folder")
    try:
        weight_map = _value(json.loads((folder / name).read_bytes()), "weight_map")
    except (OSError, ValueError) as error:
        return Check(name, False, f"{folder / name}: cannot be read: {error}. {DAMAGED}")
    wrong = [tensor for tensor, row in tensors.items() if _value(weight_map, tensor) != _value(row, "shard")]
    if wrong:
        return Check(name, False, f"{folder / name}: does not lead to {listing(wrong)}. {DAMAGED}")
    return Check(name, True, "")


def _shard(folder: Path, name: str, said: Any, rows: dict[str, Any]) -> Iterator[Check]:
    path = folder / name
    if not is_plain_relative(name):
        yield Check(name, False, f"{folder}: the manifest names a shard {printable(name)!r}, outside the folder")
        return
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        header = b"" if 8 + length > size_bytes else os.pread(file.fileno(), 8 + length, 0)
        if xxhash.xxh3_128_hexdigest(header) != _value(said, "header_xxh3_128"):
            yield Check(
                name, False, f"{path}: its header differs from the manifest's, its tensors cannot be found. {DAMAGED}"
            )
            return
        expected = _value(said, "size")
        same = size_bytes == expected
        message = "" if same else f"{path}: found {size_bytes} bytes, expected {expected}. {DAMAGED}"
        yield Check(name, same, message, len(header))
        yield from _tensors(file.fileno(), path, header, said, rows)


def _tensors(fd: int, path: Path, header: bytes, said: Any, rows: dict[str, Any]) -> Iterator[Check]:
    """Every tensor of a shard whose header is the one that was written."""
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    digests = []
    for name in sorted(entries, key=lambda name: tuple(entries[name]["data_offsets"])):
        begin, end = entries[name]["data_offsets"]
        digest = xxhash.xxh3_128()
        for piece in files.read_pieces(fd, len(header) + begin, end - begin):
            digest.update(piece)
        files.drop_cache(fd, len(header) + begin, max(1, end - begin))
        digests.append(digest.hexdigest())
        expected = _value(rows.get(name), "xxh3_128")
        same = digests[-1] == expected
        message = f"{path}: {printable(name)}: found xxh3_128 {digests[-1]}, expected {expected}. {DAMAGED}"
        yield Check(name, same, "" if same else message, end - begin)
    if gone := sorted(rows.keys() - entries.keys()):
        yield Check(path.name, False, f"{path}: does not hold {listing(gone)}, which the manifest names. {DAMAGED}")
    if joined(digests) != _value(said, "tensors_xxh3_128"):
        yield Check(path.name, False, f"{path}: its tensors together differ from the manifest's checksum. {DAMAGED}")
