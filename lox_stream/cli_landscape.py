"""`lox-stream landscape`: models on a plane around the aligned one, each judged by a command; or one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lox_stream.charts import check_picture
from lox_stream.errors import Cancelled, LoxError, OptionError, reworded
from lox_stream.grids import Place, number_text
from lox_stream.hub import local
from lox_stream.judging import judge_by
from lox_stream.landscape_file import (
    DOCUMENT,
    Axes,
    Judged,
    Landscape,
    document_for,
    values_of,
)
from lox_stream.messages import echo_json, escaped, warn
from lox_stream.names import place_name, printable, shown
from lox_stream.options import Options
from lox_stream.output_rules import JOURNAL
from lox_stream.rendering import console_of, pairs_table, table_of
from lox_stream.showing import display
from lox_stream.signals import Interruption

if TYPE_CHECKING:
    from lox_stream.api import Summary


GRID = (-0.5, 0.0, 0.5, 1.0, 1.5)  # on both axes

OF_RUN = {  # what is said of options that this command has not
    "Go on with an unfinished run by --resume, replace an earlier output by --overwrite, or c": "C",
    "the same command with --resume": "the same command",
    "with --resume": "with the same command",
    "again with --overwrite": "again in another --out",
}


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for."""

    aligned: Path
    lox: Path
    finetuned: Path
    out: Path | None
    xs: tuple[float, ...] | None  # as it was given, and GRID without
    ys: tuple[float, ...] | None
    point: Place | None
    judge: tuple[str, ...]
    pictures: tuple[Path, ...]
    options: Options
    as_json: bool
    quiet: bool


def carry_out(request: Request) -> int:
    """Measure, write, judge, show, and return the exit code; raises LoxError."""
    _require_sense(request)
    for path in request.pictures:
        check_picture(path, request.out)
    with Interruption(lambda: _stopped(request)) as interruption:
        try:
            _carried_out(request, interruption)
        except Cancelled:
            assert interruption.number is not None, "nobody else cancels"
            interruption.leave(interruption.number)
        except LoxError as error:
            raise reworded(error, in_own_words(str(error))) from error
    return 0


def in_own_words(text: str) -> str:
    """What a run says, as who typed `landscape` understands it.

    >>> in_own_words("Restore it and go on with --resume")
    'Restore it and go on with the same command'
    """
    for said, own in OF_RUN.items():
        text = text.replace(said, own)
    return text


def _require_sense(request: Request) -> None:
    """Raise OptionError for what does not go together."""
    if request.judge and request.point is not None:
        raise OptionError(
            "--point and a judge are both given, expected one: a point alone is judged by whoever reads it"
        )
    if request.out is None and (request.judge or request.point is not None):
        raise OptionError("--out is missing, expected a folder for what is written. Without it the axes are measured")
    if request.out is not None and not request.judge and request.point is None:
        raise OptionError(
            "there is no judge, expected a command behind --, with {model} in it, or one point: --point X,Y"
        )
    if not request.judge and (request.xs is not None or request.ys is not None):
        raise OptionError("--x and --y are given without a judge, of whose points they would be. Leave them out")
    if request.pictures and not request.judge:
        raise OptionError("--picture is given without a judge, of whose numbers it would be. Leave it out")


def _carried_out(request: Request, interruption: Interruption) -> None:
    judge = judge_by(request.judge, interruption.cancel) if request.judge else None
    loud = not request.quiet
    models = (
        local(request.aligned, shown=loud),
        local(request.lox, shown=loud),
        local(request.finetuned, shown=loud),
    )
    for picture in request.pictures:
        _require_apart(picture, models)
    from lox_stream.landscape import explore, measure_axes, write_point

    with _working(request, interruption) as going:
        if request.out is None:
            axes = measure_axes(*models, **going)
        elif request.point is not None:
            summary, axes = write_point(*models, request.out, request.point, **going)
        elif judge is not None:
            told = _say if loud else None
            grid = (request.xs or GRID, request.ys or GRID)
            found = explore(*models, request.out, *grid, judge, judged_by=request.judge, told=told, **going)
    if request.out is None:
        _show_axes(request, axes)
    elif request.point is not None:
        _show_point(request, request.point, summary, axes)
    else:
        _show_landscape(request, found)


@contextmanager
def _working(request: Request, interruption: Interruption) -> Iterator[dict[str, Any]]:
    """What is the same for all work."""
    with display(console_of(stderr=True), "landscape", quiet=request.quiet) as show, interruption.gently():
        yield {"options": request.options, "progress": show, "cancel": interruption.cancel}


def _require_apart(picture: Path, models: tuple[Path, ...]) -> None:
    """Raise OptionError for a picture in the folder of an input."""
    for path in models:
        if path.is_dir() and picture.resolve().is_relative_to(path.resolve()):
            raise OptionError(
                f"--picture {printable(picture)}: lies inside {printable(path)}, expected a place apart: inputs are "
                "never touched"
            )


def _stopped(request: Request) -> str:
    """What a stopped command leaves."""
    out = request.out
    if out is None or not ((out / DOCUMENT).exists() or (out / JOURNAL).exists()):
        return "stopped: nothing was judged or finished"
    return f"stopped: {place_name(out)} keeps what is finished. Go on with the same command"


def _say(one: Judged) -> None:
    said = ", ".join(f"{printable(name)} {shown(value)}" for name, value in one.verdict.items())
    click.echo(escaped(f"x {number_text(one.x)}, y {number_text(one.y)}: {said}"), err=True)


def _show_axes(request: Request, axes: Axes) -> None:
    if request.as_json:
        echo_json({"axes": asdict(axes)})
    elif not request.quiet:
        console_of().print(_axes_table(axes))


def _show_point(request: Request, point: Place, summary: Summary, axes: Axes) -> None:
    x, y = point
    if request.as_json:
        echo_json({"out": place_name(summary.out), "x": x, "y": y, "axes": asdict(axes), "warnings": summary.warnings})
    elif not request.quiet:
        console_of().print(_axes_table(axes))
        click.echo(escaped(f"wrote {place_name(summary.out)}: x {number_text(x)}, y {number_text(y)}"), err=True)
    if not request.quiet:
        warn(map(in_own_words, summary.warnings))


def _show_landscape(request: Request, found: Landscape) -> None:
    if request.pictures:
        from lox_stream.figures import picture_of

        for path in request.pictures:
            picture_of(found, path)
            if not request.quiet:
                click.echo(escaped(f"wrote {path}"), err=True)
    if request.as_json:
        echo_json(document_for(found))
    elif not request.quiet:
        console = console_of()
        console.print(_axes_table(found.axes))
        for name, values in values_of(found.points).items():
            rows = [
                [number_text(y), *(f"{values[x, y]:.4g}" if (x, y) in values else "-" for x in found.xs)]
                for y in reversed(found.ys)
            ]
            columns = ["y \\ x", *map(number_text, found.xs)]
            console.print(table_of(printable(name), columns, rows, right=range(len(columns))))
    if not request.quiet:
        warn(map(in_own_words, found.warnings))


def _axes_table(axes: Axes) -> Any:
    return pairs_table(
        "Axes",
        [
            ("|d1|, d1 = lox - aligned", f"{axes.lox_norm:.6g}"),
            ("|finetuned - aligned|", f"{axes.finetuned_norm:.6g}"),
            ("|d2|, its part across d1", f"{axes.second_norm:.6g}"),
            ("angle between the two", f"{axes.angle_degrees:.2f} degrees"),
            ("aligned, lox, finetuned lie at", f"(0, 0), (1, 0), ({axes.c:.6g}, 1)"),
        ],
    )
