"""Models in the cache of huggingface_hub, which checks lengths alone: held against their sha256, once.

What was found right is noted beside the model in the cache, with size and times of the file: a file that anybody has
touched since is read again. Where the note cannot be written (a cache that is read-only), every run reads all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lox_stream import files
from lox_stream.errors import DataError
from lox_stream.remote import RemoteFile, wanted

NOTE = "lox_stream.checked.json"  # beside `blobs` and `snapshots`
SHA256 = re.compile(r"[0-9a-f]{64}")


def promised_offline(snapshot: Path) -> dict[str, str]:
    """The sha256 of a snapshot's files by their names, as the hub said when they came: the cache calls them by it."""
    paths = {path.relative_to(snapshot).as_posix(): path for path in snapshot.rglob("*") if path.is_file()}
    found = [
        RemoteFile(name, str(path), 0, lambda start, end: b"", sha256=path.resolve().name)
        for name, path in sorted(paths.items())
        if SHA256.fullmatch(path.resolve().name)
    ]
    return {file.name: file.sha256 for file in wanted(found)}


def wrong_files(snapshot: Path, promised: Mapping[str, str]) -> list[str]:
    """Names of the files that are not there, or whose bytes are not what was promised.

    Raises DataError for what cannot be read.
    """
    note = snapshot.parent.parent / NOTE
    known, wrong = _read(note), []
    for name, sha256 in promised.items():
        path = (snapshot / name).resolve()
        with files.explained(path, "read it in the cache", "Look at its rights, or remove it there.", DataError):
            if not path.is_file():
                wrong.append(name)
                continue
            mark = [sha256, *_mark(path)]
            if known.get(str(path)) == mark:
                continue
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            wrong.append(name)
            continue
        known[str(path)] = mark
        with contextlib.suppress(OSError):
            files.replace_file(note, json.dumps(known, indent=1).encode())
    return wrong


def _mark(path: Path) -> tuple[int, int, int]:
    """What changes when somebody writes to a file, or puts another in its place."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(note: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(note.read_bytes())
        return known if isinstance(known, dict) else {}
    return {}
