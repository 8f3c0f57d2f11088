"""The landscape around an aligned model: the models at the points of a plane, one after the other, each judged.

Axis 1 is LoX's output minus aligned, axis 2 what a fine-tuning did, made orthogonal to it. A point's checkpoint is
written, judged and removed before the next one is made.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lox_stream import files
from lox_stream.api import Summary, execute
from lox_stream.axes import measure
from lox_stream.errors import InUseError, JudgeError, OutputError
from lox_stream.hub import local
from lox_stream.judging import Judge
from lox_stream.landscape_file import (
    DOCUMENT,
    Axes,
    Judged,
    Landscape,
    Place,
    is_number,
    number_text,
    read_landscape,
    require_places,
    require_same,
    write_landscape,
)
from lox_stream.manifest import input_of
from lox_stream.names import listing, printable, shown
from lox_stream.options import Options, check_options, check_platform
from lox_stream.output_rules import JOURNAL, is_finished
from lox_stream.planning import DEFAULTS, Plan
from lox_stream.staging import Show, Track
from lox_stream.triples import Models, open_models, plan_point


def measure_axes(
    aligned: str | Path,
    lox: str | Path,
    finetuned: str | Path,
    *,
    options: Options = DEFAULTS,
    progress: Show | None = None,
    cancel: threading.Event | None = None,
) -> Axes:
    """How LoX's direction and the fine-tuning's lie: one pass over the three models, nothing is written.

    Of `options` memory_bytes and threads count. Raises LoxError of some kind.
    """
    work = _Work(_opened(aligned, lox, finetuned), options, progress, cancel)
    work.track.begin(1)
    return work.measured()


def write_point(
    aligned: str | Path,
    lox: str | Path,
    finetuned: str | Path,
    out: str | Path,
    place: Place,
    *,
    options: Options = DEFAULTS,
    progress: Show | None = None,
    cancel: threading.Event | None = None,
) -> tuple[Summary, Axes]:
    """Write the model at one point to a folder, new or empty, or with this point unfinished in it.

    from lox_stream.landscape import write_point

    write_point("aligned", "lox", "attacked", "halfway", (0.5, 0.5))
    """
    ((x,), (y,)) = (require_places([number], axis) for number, axis in zip(place, "xy", strict=True))
    work, folder = _Work(_opened(aligned, lox, finetuned), options, progress, cancel), Path(out).absolute()
    work.plan((x, y), 0.0, folder)  # what is wrong with the folder is said before the work
    work.track.begin(2)
    axes = work.measured()
    with work.track.stage(_named((x, y))) as show:
        return work.write((x, y), axes, folder, show), axes


def explore(
    aligned: str | Path,
    lox: str | Path,
    finetuned: str | Path,
    out: str | Path,
    xs: Sequence[float],
    ys: Sequence[float],
    judge: Judge,
    *,
    judged_by: Sequence[str] = (),
    options: Options = DEFAULTS,
    progress: Show | None = None,
    told: Callable[[Judged], None] | None = None,
    cancel: threading.Event | None = None,
) -> Landscape:
    """Write, judge and remove the model at each point; what was said goes to landscape.json and .csv in `out`.

    `judge(folder, x, y)` returns a dictionary with a number at least. `judged_by` is what it is called: a landscape
    goes on, or grows, with the same one alone. Points that `out` holds are not made again. `told` is called for each
    new one.

    Raises LoxError of some kind, and what `judge` raises; what was judged before is kept then, and so is the point's
    checkpoint.

        from lox_stream.landscape import explore

        explore("aligned", "lox", "attacked", "landscape", (0, 1), (0, 1), lambda folder, x, y: {"asr": 0.5})
    """
    work, folder = _Work(_opened(aligned, lox, finetuned), options, progress, cancel), Path(out).absolute()
    asked = Landscape(
        {side: input_of(checkpoint) for side, checkpoint in work.models.sides.items()},
        tuple(judged_by),
        require_places(xs, "x"),
        require_places(ys, "y"),
    )
    if not (folder / DOCUMENT).exists():  # what is wrong with the place is said before the work
        work.plan(asked.grid[0], 0.0, _folder_of(folder, asked.grid[0]))
    with _held(folder):
        known = _known(folder, asked)
        work.track.begin(1 + len(asked.grid), 0 if known is None else 1 + len(known.points))
        if known is None:
            known = replace(asked, axes=work.measured())
            write_landscape(folder, known)
        for place in _to_do(folder, known):
            known = work.with_point(known, place, _folder_of(folder, place), judge)
            write_landscape(folder, known)
            _remove(_folder_of(folder, place))
            if told is not None:
                told(known.points[-1])
    return known


class _Work:
    """What is the same for every point: the models, the machine's options, whom progress is told, and who stops it."""

    def __init__(self, models: Models, options: Options, progress: Show | None, cancel: threading.Event | None) -> None:
        self.models, self.cancel = models, cancel
        self.options = Options(  # nothing is solved
            alpha=0.0, device="cpu", memory_bytes=options.memory_bytes, threads=options.threads
        )
        check_options(self.options)
        self.track = Track(sum(info.n_bytes for info in models.aligned.tensors.values()), progress)

    def plan(self, place: Place, c: float, folder: Path) -> Plan:
        return plan_point(self.models, *place, c, folder, self.options)

    def measured(self) -> Axes:
        with self.track.stage("measuring") as show:
            return measure(self.models, self.options, progress=show, cancel=self.cancel)

    def write(self, place: Place, axes: Axes, folder: Path, show: Show) -> Summary:
        resume = (folder / JOURNAL).exists()
        return execute(self.plan(place, axes.c, folder), resume=resume, progress=show, cancel=self.cancel)

    def with_point(self, known: Landscape, place: Place, folder: Path, judge: Judge) -> Landscape:
        """The landscape with one point more, whose checkpoint is left there."""
        warnings, started = known.warnings, time.monotonic()
        with self.track.stage(_named(place)) as show:
            if not is_finished(folder):
                warnings = tuple(dict.fromkeys((*warnings, *self.write(place, known.axes, folder, show).warnings)))
            written = time.monotonic()
            self.track.say(f"{_named(place)}: the judge")
            verdict = judge(folder, *place)
        if not any(map(is_number, verdict.values())):
            raise JudgeError(f"the judge at {_named(place)} said {shown(verdict)}, expected a number in it")
        one = Judged(*place, verdict, written - started, time.monotonic() - written)
        return replace(known, points=(*known.points, one), warnings=warnings)


def _opened(aligned: str | Path, lox: str | Path, finetuned: str | Path) -> Models:
    check_platform()
    return open_models(local(aligned), local(lox), local(finetuned))


def _named(place: Place) -> str:
    return f"x {number_text(place[0])}, y {number_text(place[1])}"


def _folder_of(folder: Path, place: Place) -> Path:
    """Where a point's checkpoint lies while it is judged."""
    return folder / f"x{number_text(place[0])}_y{number_text(place[1])}"


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder, made and locked."""
    with files.explained(folder, "prepare the landscape", "Choose another --out"):
        files.make_folder(folder)
        try:
            fd, _ = files.lock_folder(folder)
        except BlockingIOError:
            raise InUseError(
                f"{printable(folder)}: another process works on this landscape. Wait for it, or choose another --out"
            ) from None
    try:
        yield
    finally:
        files.close(fd)


def _known(folder: Path, asked: Landscape) -> Landscape | None:
    """What the folder holds of this landscape, on the grid that is asked for."""
    before = read_landscape(folder)
    if before is not None:
        require_same(before, asked)
        return replace(before, xs=asked.xs, ys=asked.ys)
    held = [path.name for path in folder.iterdir() if not path.name.startswith(("landscape.csv", "landscape.json"))]
    if held:
        raise OutputError(
            f"{printable(folder)}: holds {listing(sorted(held))} and no landscape.json, expected a new or empty "
            "folder. Choose another --out"
        )
    return None


def _to_do(folder: Path, known: Landscape) -> list[Place]:
    """The places that are not judged; first one whose checkpoint is there already, so that there is never another."""
    done = {one.place for one in known.points}
    for place in done:
        _remove(_folder_of(folder, place))  # of a session that was killed before it came to that
    return sorted(
        (place for place in known.grid if place not in done), key=lambda at: not _folder_of(folder, at).exists()
    )


def _remove(folder: Path) -> None:
    """A point's checkpoint, with whatever the judge left in it."""
    if folder.exists():
        with files.explained(folder, "remove it", "What was judged is kept: remove it, and run the same command again"):
            shutil.rmtree(folder)
