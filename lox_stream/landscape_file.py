"""`landscape.json` and `landscape.csv`: the axes of a landscape, its grid, and what a judge said of each point."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from lox_stream import __version__
from lox_stream.errors import OptionError, OutputError, ResumeError
from lox_stream.files import explained, replace_file, sync_folder
from lox_stream.journal import finite
from lox_stream.names import listing, printable, shown
from lox_stream.shards import is_regular, parse_json

DOCUMENT, TABLE = "landscape.json", "landscape.csv"
FORMAT = 1
MOST = 1000  # places on an axis

Place = tuple[float, float]  # x, y


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


def places_of(text: str, option: str) -> tuple[float, ...]:
    """`FROM:TO:COUNT`, at even distances, or numbers with commas; raises OptionError.

    >>> places_of("-0.5:1.5:5", "--x"), places_of("0,1,0.3", "--x")
    ((-0.5, 0.0, 0.5, 1.0, 1.5), (0.0, 0.3, 1.0))
    """
    try:
        if ":" in text:
            first, last, count = text.split(":")
            start, end, n = Fraction(first), Fraction(last), int(count)
            if not 2 <= n <= MOST or start == end:
                raise ValueError
            found = [float(start + (end - start) * i / (n - 1)) for i in range(n)]  # exact, and rounded once
        else:
            found = [float(Fraction(word)) for word in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        found = []
    if not found or len({*found}) < len(found) or len(found) > MOST:
        raise OptionError(
            f"{option} is {printable(text)}, expected FROM:TO:COUNT such as -0.5:1.5:5, or numbers with commas, each "
            f"once and at most {MOST}"
        )
    return tuple(sorted(found))


def require_places(numbers: Sequence[float], of: str) -> tuple[float, ...]:
    """Places on an axis as floats, in order; raises OptionError for what is no number, or named twice."""
    found = tuple(sorted(float(number) + 0.0 for number in numbers))  # of which -0 is 0
    if not found or len({*found}) < len(found) or not all(map(math.isfinite, found)):
        raise OptionError(f"{of} is {shown(list(numbers))}, expected finite numbers, each once")
    return found


def number_text(number: float) -> str:
    """The shortest text that is this number: `0.3`, `-1`."""
    return repr(number).removesuffix(".0")


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
        return Landscape(
            {side: dict(one) for side, one in said["inputs"].items()},
            tuple(map(str, said["judge"])),
            tuple(map(float, said["x"])),
            tuple(map(float, said["y"])),
            Axes(**{name: float(value) for name, value in said["axes"].items()}),
            tuple(map(_judged, said["points"])),
            tuple(map(str, said["warnings"])),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{printable(path)}: is no landscape of this version, or damaged ({printable(str(error))}). Restore it, or "
            "choose another --out"
        ) from error


def _judged(row: Mapping[str, Any]) -> Judged:
    x, y, written_s, judged_s = (float(row[key]) for key in ("x", "y", "written_s", "judged_s"))
    return Judged(x, y, dict(row["verdict"]), written_s, judged_s)


def require_same(before: Landscape, asked: Landscape) -> None:
    """Raise ResumeError for other models or another judge than a folder's, or a grid that lacks some of its places."""
    problems = []
    for side, one in asked.inputs.items():
        was = before.inputs.get(side, {})
        if was.get("shards") != one["shards"]:
            problems.append(f"{side} is {printable(one['path'])}, it began with {printable(str(was.get('path')))}")
    if asked.judge != before.judge:
        problems.append(f"the judge is {shown(list(asked.judge))}, it began with {shown(list(before.judge))}")
    wanted = {*asked.grid}
    off = [f"({number_text(x)}, {number_text(y)})" for x, y in before.grid if (x, y) not in wanted]
    if off:
        problems.append(f"the grid lacks {listing(off)}, expected all that it began with: it may only grow")
    if problems:
        way_out = "Give what it began with, or choose another --out"
        raise ResumeError("\n".join(["--out holds another landscape:", *problems, way_out]))


def write_landscape(folder: Path, landscape: Landscape) -> None:
    """Replace both files, durably; the table first, for the document is what counts."""
    with explained(folder, "write what the judge said", "What is judged is kept: the same command goes on"):
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
    return json.dumps(value) if isinstance(value, dict | list | bool) else value


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


def is_number(value: Any) -> bool:
    """Whether JSON holds a number there."""
    return isinstance(value, int | float) and not isinstance(value, bool)
