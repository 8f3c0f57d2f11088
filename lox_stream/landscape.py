"""The landscape around an aligned model: the models at the points of a plane, one after the other, each judged.

Axis 1 is LoX's output minus aligned, axis 2 what a fine-tuning did, made orthogonal to it. A point's checkpoint is
written, judged and removed before the next one is made.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lox_stream import files, points
from lox_stream.api import Summary, execute
from lox_stream.axes import measure
from lox_stream.errors import DataError, InUseError
from lox_stream.grids import Place, place_text, require_place, require_places
from lox_stream.hub import local
from lox_stream.judging import Judge, require_verdict
from lox_stream.landscape_file import (
    DOCUMENT,
    Axes,
    Judged,
    Landscape,
    write_landscape,
)
from lox_stream.manifest import input_of
from lox_stream.names import listing, printable
from lox_stream.options import Options, check_options, check_platform
from lox_stream.output_rules import JOURNAL, is_finished
from lox_stream.planning import DEFAULTS, Plan
from lox_stream.resuming import changed_files
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
    place, folder = require_place(place), Path(out).absolute()
    work = _Work(_opened(aligned, lox, finetuned), options, progress, cancel)
    points.require_outside(folder)  # what is wrong with the folder is said before the work
    work.plan(place, 0.0, folder)
    work.track.begin(2)
    axes = work.measured()
    with work.track.stage(place_text(place)) as show:
        return work.write(place, axes, folder, show), axes


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

    `judge(folder, x, y)` returns a dictionary with a number at least, and with the same keys at each point. `judged_by`
    is what it is called: a landscape goes on, or grows, with the same one alone. Points that `out` holds are not made
    again. `told` is called for each new one.

    Raises LoxError of some kind, and what `judge` raises; what was judged before is kept then, and so is the point's
    checkpoint.

        from lox_stream.landscape import explore

        explore("aligned", "lox", "attacked", "landscape", (0, 1), (0, 1), lambda folder, x, y: {"asr": 0.5})
    """
    grid, folder = (require_places(xs, "x"), require_places(ys, "y")), Path(out).absolute()
    work = _Work(_opened(aligned, lox, finetuned), options, progress, cancel)
    inputs = {side: input_of(checkpoint) for side, checkpoint in work.models.sides.items()}
    asked = Landscape(inputs, tuple(judged_by), *grid)
    if not (folder / DOCUMENT).exists():  # what is wrong with the place is said before the work
        work.plan(asked.grid[0], 0.0, points.folder_of(folder, asked.grid[0]))
    with _held(folder):
        before = points.before_in(folder, asked)
        kept = points.kept_points(folder, {*asked.grid, *before.grid}, inputs)  # all, before anything is removed
        work.track.begin(1 + len(asked.grid), 0 if before is asked else 1 + len(before.points))
        known = replace(before, xs=asked.xs, ys=asked.ys)
        if before is asked:
            known = replace(known, axes=work.measured())
        if before is asked or known != before:
            write_landscape(folder, known)
        for place in _to_do(known, kept):
            known = work.with_point(known, place, points.folder_of(folder, place), judge)
            points.require_there(folder, place)
            write_landscape(folder, known)
            points.remove(points.folder_of(folder, place))
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
            axes = measure(self.models, self.options, progress=show, cancel=self.cancel)
        self.require_unchanged()
        return axes

    def write(self, place: Place, axes: Axes, folder: Path, show: Show) -> Summary:
        resume = (folder / JOURNAL).exists()
        return execute(self.plan(place, axes.c, folder), resume=resume, progress=show, cancel=self.cancel)

    def require_unchanged(self) -> None:
        """Raise DataError where a model is not any more what was opened: axes and points would be of several."""
        if changed := changed_files(self.models.sides.values()):
            raise DataError(
                f"{listing(map(str, changed))}: was modified since the work began, expected models that stay as they "
                "are. Put it back and run the same command again, or choose another --out"
            )

    def ready(self, known: Landscape, place: Place, folder: Path, show: Show) -> tuple[str, ...]:
        """See that a point's model is there, whole and of these inputs; the warnings of making it."""
        self.require_unchanged()
        if is_finished(folder):
            if points.is_whole(folder, self.cancel):
                return ()
            points.remove(folder)
        warnings = self.write(place, known.axes, folder, show).warnings
        try:
            self.require_unchanged()
        except DataError:
            points.remove(folder)  # nobody knows of which bytes it was made
            raise
        return warnings

    def with_point(self, known: Landscape, place: Place, folder: Path, judge: Judge) -> Landscape:
        """The landscape with one point more, whose checkpoint is left there."""
        started = time.monotonic()
        with self.track.stage(place_text(place)) as show:
            warnings = tuple(dict.fromkeys((*known.warnings, *self.ready(known, place, folder, show))))
            written = time.monotonic()
            self.track.say(f"{place_text(place)}: the judge")
            verdict = judge(folder, *place)
        require_verdict(verdict, known, place)
        one = Judged(*place, dict(verdict), written - started, time.monotonic() - written)
        return replace(known, points=(*known.points, one), warnings=warnings)


def _opened(aligned: str | Path, lox: str | Path, finetuned: str | Path) -> Models:
    check_platform()
    return open_models(local(aligned), local(lox), local(finetuned))


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


def _to_do(known: Landscape, kept: Mapping[Place, Path]) -> list[Place]:
    """The places that are not judged; first one whose checkpoint is there already, so that there is never another.

    Removes those that were judged when a session was killed, or that the grid has not any more.
    """
    done, wanted = {one.place for one in known.points}, {*known.grid}
    for place, path in kept.items():
        if place in done or place not in wanted:
            points.remove(path)
    return sorted((place for place in known.grid if place not in done), key=lambda at: at not in kept)
