"""`landscape.json` and `landscape.csv`: the axes of a landscape, its grid, and what a judge said of each point."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lox_stream import __version__
from lox_stream.errors import OptionError, OutputError, ResumeError
from lox_stream.files import explained, replace_file, sync_folder
from lox_stream.grids import Place, is_number, number_text, require_places
from lox_stream.journal import finite
from lox_stream.names import listing, printable, shown
from lox_stream.shards import is_regular, parse_json

DOCUMENT, TABLE = "landscape.json", "landscape.csv"
FORMAT = 1
WORD = re.compile(r"\w")  # how what a judge names begins: no spreadsheet takes it for a formula


@dataclass(frozen=True, slots=True)
class Axes:
    """How the directions lie: d1 = lox - aligned, and d2 = finetuned - aligned - c * d1, which is orthogonal to it."""

    c: float  # <finetuned - aligned, d1> / |d1|^2: the fine-tuned model lies at (c, 1)
    lox_norm: float  # |d1|
    finetuned_norm: float  # |finetuned - aligned|
    second_norm: float  # |d2|
    angle_degrees: float  # between finetuned - aligned and d1


@dataclass(frozen=True, slots=True)
class Judged:
    """A point, and what was said of it."""

    x: float
    y: float
    verdict: Mapping[str, Any]  # at least one number
    written_s: float
    judged_s: float

    @property
    def place(self) -> Place:
        return self.x, self.y


@dataclass(frozen=True, slots=True)
class Landscape:
    """All that is known so far."""

    inputs: Mapping[str, Any]  # of each model its path and what tells its files from others
    judge: tuple[str, ...]
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    axes: Axes = Axes(0.0, 0.0, 0.0, 0.0, 0.0)  # until they are measured
    points: tuple[Judged, ...] = ()  # in the order in which they were judged
    warnings: tuple[str, ...] = ()  # complete messages

    @property
    def grid(self) -> list[Place]:
        """All places, row by row."""
        return [(x, y) for y in self.ys for x in self.xs]


def read_landscape(folder: Path) -> Landscape | None:
    """What a folder holds of a landscape; None where there is none. Raises OutputError for what is no such document."""
    path = folder / DOCUMENT
    if not path.exists():
        return None
    try:
        if not is_regular(path):
            raise ValueError("no file")
        with explained(path, "read it", "Check its permissions and its disk"):
            said, _ = parse_json(path.read_bytes())
        if said["format"] != FORMAT:
            raise ValueError(f"format {shown(said['format'])}, expected {FORMAT}")
        return _checked(said)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, OptionError) as error:
        raise OutputError(
            f"{printable(path)}: is no landscape of this version, or damaged ({printable(str(error))}). Restore it, or "
            "choose another --out"
        ) from error


def _checked(said: Mapping[str, Any]) -> Landscape:
    """The landscape that JSON says; raises one of many errors for another thing."""
    found = Landscape(
        {side: dict(one) for side, one in said["inputs"].items()},
        tuple(said["judge"]),
        require_places(said["x"], "x"),
        require_places(said["y"], "y"),
        Axes(**said["axes"]),
        tuple(map(_judged, said["points"])),
        tuple(said["warnings"]),
    )
    if not all(map(is_number, asdict(found.axes).values())):
        raise ValueError("axes that are no finite numbers")
    if not all(isinstance(word, str) for word in (*found.judge, *found.warnings)):
        raise ValueError("a judge or warnings that are no texts")
    places = [one.place for one in found.points]
    if len({*places}) < len(places) or not {*places} <= {*found.grid}:
        raise ValueError("points that are twice there, or not on the grid")
    return found


def _judged(row: Mapping[str, Any]) -> Judged:
    numbers = [row[key] for key in ("x", "y", "written_s", "judged_s")]
    if not all(map(is_number, numbers)):
        raise ValueError(f"a point at {shown(numbers)}")
    if problem := verdict_problem(row["verdict"]):
        raise ValueError(f"the verdict {shown(row['verdict'])}, {problem}")
    x, y, written_s, judged_s = map(float, numbers)
    return Judged(x, y, dict(row["verdict"]), written_s, judged_s)


def verdict_problem(said: Any) -> str:
    """Why this is not what a judge may say, as JSON has it; nothing where it is.

    >>> verdict_problem({"asr": 0.5, "of": "advbench"}), verdict_problem({"of": "advbench"})
    ('', 'expected a number in it')
    """
    if not isinstance(said, Mapping):
        return "expected an object with a number in it"
    odd = [key for key in said if not (isinstance(key, str) and WORD.match(key) and key.isprintable())]
    if odd:
        return f"expected keys that begin with a letter or a digit and have no control characters, found {shown(odd)}"
    if {"x", "y"} & said.keys():
        return "expected no x or y in it"
    numbers = [value for value in said.values() if isinstance(value, int | float) and not isinstance(value, bool)]
    if not all(map(is_number, numbers)):
        return "expected a finite number, and no other, in it"
    if not numbers:
        return "expected a number in it"
    try:
        json.dumps(said, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        return f"expected what JSON can hold ({printable(str(error))})"
    return ""


def require_same(before: Landscape, asked: Landscape) -> None:
    """Raise ResumeError for other models or another judge than a folder's, or a grid that lacks what was judged."""
    problems = []
    for side, one in asked.inputs.items():
        was = before.inputs.get(side, {})
        path, began = printable(one["path"]), printable(str(was.get("path")))
        if was.get("shards") != one["shards"] and path == began:
            problems.append(f"{side}: the weights of {path} have changed, expected the files that it began with")
        elif was.get("shards") != one["shards"]:
            problems.append(f"{side} is {path}, it began with {began}")
    if asked.judge != before.judge:
        problems.append(f"the judge is {shown(list(asked.judge))}, it began with {shown(list(before.judge))}")
    wanted = {*asked.grid}
    off = [f"({number_text(one.x)}, {number_text(one.y)})" for one in before.points if one.place not in wanted]
    if off:
        problems.append(f"the grid lacks {listing(off)}, expected all that was judged: only other places may go")
    if problems:
        way_out = "Give what it began with, or choose another --out"
        raise ResumeError("\n".join(["--out holds another landscape:", *problems, way_out]))


def write_landscape(folder: Path, landscape: Landscape) -> None:
    """Replace both files, durably; the table first, for the document is what counts."""
    with explained(folder, "write what the judge said", "Where landscape.json is there, the same command goes on"):
        replace_file(folder / TABLE, table_text(landscape).encode("utf-8", "surrogateescape"))
        replace_file(folder / DOCUMENT, (json.dumps(document_for(landscape), indent=1) + "\n").encode())
        sync_folder(folder)


def document_for(landscape: Landscape) -> dict[str, Any]:
    """The landscape as JSON holds it; points in the order of the grid."""
    by_place = {one.place: one for one in landscape.points}
    said = {
        "format": FORMAT,
        "lox_stream": __version__,
        "inputs": landscape.inputs,
        "judge": list(landscape.judge),
        "axes": asdict(landscape.axes),
        "x": list(landscape.xs),
        "y": list(landscape.ys),
        "points": [asdict(by_place[place]) for place in landscape.grid if place in by_place],
        "warnings": list(landscape.warnings),
    }
    return dict(finite(said))


def table_text(landscape: Landscape) -> str:
    """CSV: a line for each point, a column for each thing that was said."""
    points = document_for(landscape)["points"]
    keys = list(dict.fromkeys(key for one in points for key in one["verdict"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["x", "y", *keys])
    for one in points:
        writer.writerow([one["x"], one["y"], *(_cell(one["verdict"].get(key)) for key in keys)])
    return text.getvalue()


def _cell(value: Any) -> Any:
    is_plain = not isinstance(value, str) or (value.isprintable() and not value.startswith(("=", "+", "-", "@")))
    return value if is_plain and not isinstance(value, dict | list | bool) else json.dumps(value)


def values_of(points: Sequence[Judged]) -> dict[str, dict[Place, float]]:
    """The numbers that were said, by their names and places.

    >>> values_of([Judged(0.0, 1.0, {"asr": 0.5, "of": "advbench"}, 1.0, 2.0)])
    {'asr': {(0.0, 1.0): 0.5}}
    """
    found: dict[str, dict[Place, float]] = {}
    for one in points:
        for name, value in one.verdict.items():
            if is_number(value):
                found.setdefault(name, {})[one.place] = float(value)
    return found
