"""What a landscape's folder holds, and the folders of its points: whose they are, whether they are whole, their end."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lox_stream import files
from lox_stream.errors import Cancelled, InUseError, JudgeError, LoxError, OutputError
from lox_stream.grids import Place, number_text, place_text
from lox_stream.journal import replay
from lox_stream.landscape_file import DOCUMENT, TABLE, Landscape, read_landscape, require_same
from lox_stream.manifest import read_manifest
from lox_stream.names import listing, printable
from lox_stream.output_rules import JOURNAL, MANIFEST
from lox_stream.verifying import verify_checksums

CALLED = {"lox": "base", "aligned": "aligned", "finetuned": "finetuned"}  # the sides, as journal and manifest do
MARKS = (JOURNAL, MANIFEST)


def folder_of(folder: Path, place: Place) -> Path:
    """Where a point's checkpoint lies while it is judged."""
    return folder / f"x{number_text(place[0])}_y{number_text(place[1])}"


def before_in(folder: Path, asked: Landscape) -> Landscape:
    """What the folder holds of this landscape; `asked` itself where it holds nothing."""
    before = read_landscape(folder)
    if before is not None:
        require_same(before, asked)
        return before
    held = [path.name for path in folder.iterdir() if not _is_of_a_crash(path)]
    if held:
        raise OutputError(
            f"{printable(folder)}: holds {listing(sorted(held))} and no landscape.json, expected a new or empty "
            "folder. Choose another --out"
        )
    return asked


def _is_of_a_crash(path: Path) -> bool:
    """What is written before there is a landscape.json, and holds no point: a table of one line."""
    if path.name == TABLE:
        return path.is_file() and path.read_bytes().count(b"\n") <= 1
    return path in map(files.partial, (path.with_name(DOCUMENT), path.with_name(TABLE)))


def kept_points(folder: Path, places: Iterable[Place], inputs: Mapping[str, Any]) -> dict[Place, Path]:
    """The points whose folders are there, each made of these inputs; looks only.

    Raises OutputError for what has the name of one and is something else, InUseError where a judge still lives in it.
    """
    by_name = {folder_of(folder, place).name: place for place in places}
    found = {by_name[path.name]: path for path in sorted(folder.iterdir()) if path.name in by_name}
    for place, path in found.items():
        if not _is_own(path, place, inputs):
            raise OutputError(
                f"{printable(path)}: is not the model of this landscape at {place_text(place)}, expected that or "
                "nothing: it would be judged and removed. Move it away, or choose another --out"
            )
        _require_free(path)
    return found


def _is_own(path: Path, place: Place, inputs: Mapping[str, Any]) -> bool:
    """Whether its journal, or its manifest, says that it is the point; or it is empty, as a crash may leave it."""
    if path.is_symlink() or not path.is_dir():
        return False
    if not any(path.iterdir()):
        return True
    try:
        state = replay(path)
        if state is not None:
            at, made_of = state.header["options"], state.header["inputs"]
            rows = {side: _rows(made_of[side], "header", "sample") for side in made_of}
        else:
            found = read_manifest(path)
            at, made_of = found["point"], found["inputs"]
            rows = {side: _rows(made_of[side]["shards"]) for side in made_of}
        expected = {CALLED[side]: _rows(one["shards"]) for side, one in inputs.items()}
        return bool((at["x"], at["y"]) == place and rows == expected)
    except (LoxError, LookupError, TypeError, AttributeError):
        return False


def _rows(shards: Mapping[str, Any], header: str = "header_xxh3_128", sample: str = "sample_xxh3_64") -> dict[str, Any]:
    return {name: (row["size"], row[header], row[sample]) for name, row in shards.items()}


def _require_free(path: Path) -> None:
    with files.explained(path, "look at it", "Check its permissions, or choose another --out"):
        try:
            fd, _ = files.lock_folder(path)
        except BlockingIOError:
            raise InUseError(
                f"{printable(path)}: a judge that an earlier command started is still at work there. Wait for it, or "
                "end it, and run the same command again"
            ) from None
    files.close(fd)


def is_whole(path: Path, cancel: threading.Event | None) -> bool:
    """Whether a finished point is byte for byte as it was written: its judge may have changed it. Raises Cancelled."""
    for check in verify_checksums(path):
        if cancel is not None and cancel.is_set():
            raise Cancelled("stopped on request")
        if not check.ok:
            return False
    return True


def remove(path: Path) -> None:
    """A point's folder with whatever the judge left in it; last what tells whose it is, so that a crash is mended."""
    with files.explained(path, "remove it", "Remove it, and run the same command again"):
        if not path.exists():
            return
        for inside in sorted(path.iterdir()):
            if inside.is_dir() and not inside.is_symlink():
                shutil.rmtree(inside)
            elif inside.name not in MARKS:
                inside.unlink()
        shutil.rmtree(path)


def require_outside(out: Path) -> None:
    """Raise OutputError for a folder that is, or lies in, a landscape."""
    for parent in (out, *out.resolve().parents):
        if (parent / DOCUMENT).exists():
            raise OutputError(
                f"{printable(out)}: {printable(parent)} is the folder of a landscape, expected one outside: what lies "
                "there is judged and removed. Choose another --out"
            )


def require_there(folder: Path, place: Place) -> None:
    """Raise JudgeError where the judge took the landscape away."""
    if not (folder / DOCUMENT).exists():
        raise JudgeError(
            f"{printable(folder)}: landscape.json is gone after the judge at {place_text(place)}, expected a judge "
            "that leaves it: what was judged before is lost with it. Mend the judge, and choose another --out"
        )
