"""`lox-stream bench`: solvers side by side on a sample of one's own pair."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lox_stream.charts import check_file, check_picture, need, picture, terminal_plot
from lox_stream.errors import OptionError
from lox_stream.messages import echo_json, escaped, warn
from lox_stream.names import printable
from lox_stream.options import Options, is_gpu
from lox_stream.planning import Plan, plan
from lox_stream.rendering import console_of, solver_table
from lox_stream.signals import Interruption

if TYPE_CHECKING:
    from lox_stream.comparing import LeftOut, Measured

ALPHA = 1.25


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for."""

    base: Path
    aligned: Path
    tensors: tuple[str, ...]
    ranks: tuple[int, ...]
    solvers: tuple[str, ...]  # (): all of them
    shares: tuple[float, ...]  # of bit-identical elements; the tables are for the first
    per_shape: int
    repeats: int
    limit_s: float
    seed: int
    device: str
    as_json: bool
    plot: bool
    pictures: tuple[Path, ...]
    table: Path | None  # CSV


def numbers(text: str, option: str, kind: type, least: float, most: float) -> tuple[Any, ...]:
    """`6,16,64` as numbers, each once; raises OptionError."""
    try:
        values = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        values = ()
    if not values or not all(least <= value <= most for value in values):
        raise OptionError(f"{option} {text}: expected numbers from {least:,} to {most:,} with commas between them")
    return values


def carry_out(request: Request) -> int:
    """Measure, show, and return the exit code."""
    for path in request.pictures:
        check_picture(path)
    if request.plot:
        need("plotext", "--plot")
    if request.table is not None:
        check_file(request.table, "--csv")
    with Interruption(lambda: "stopped"):
        made = plan(request.base, request.aligned, options=Options(device=request.device))
        if is_gpu(request.device):
            raise OptionError(
                f"--device {request.device}: solvers are compared on the CPU in this release. Leave the option out"
            )
        from lox_stream.comparing import LeftOut, Measured
        from lox_stream.device import settled

        made = settled(made)
        results = list(_measured(request, made))
        rows = [result for result in results if isinstance(result, Measured)]
        out = [result for result in results if isinstance(result, LeftOut)]
        _show(request, rows, out)
        warn(made.warnings)
        if not rows:
            raise OptionError("nothing was compared: what was left out, and why, stands above. Choose others")
        _write(request, rows)
    return 0


def _measured(request: Request, made: Plan) -> Iterator[Measured | LeftOut]:
    """Every result, with what is going on on stderr."""
    from lox_stream.cases import choose, load
    from lox_stream.comparing import Case, LeftOut, compare
    from lox_stream.contenders import CONTENDERS
    from lox_stream.options import thread_count
    from lox_stream.reference import Bands, leading
    from lox_stream.workers import Workers

    for name in request.solvers:
        if name not in CONTENDERS:
            raise OptionError(f"--solvers {printable(name)}: no such solver, expected some of {', '.join(CONTENDERS)}")
    contenders = [CONTENDERS[name] for name in request.solvers or CONTENDERS]
    chosen = choose(made, request.tensors, request.per_shape, request.seed)
    if not chosen:
        raise OptionError("the pair has no matrix that a run would extrapolate, expected one at least")
    with Workers(thread_count(made.options)) as workers:
        for choice in chosen:
            w1, w0 = load(choice)
            ranks = [rank for rank in request.ranks if rank < min(w1.shape)]
            for rank in request.ranks:
                if rank not in ranks:
                    yield LeftOut(choice.name, "all", f"rank {rank} is not under its short side, {min(w1.shape)}")
            if ranks and bool((w1 == w0).all()):
                yield LeftOut(choice.name, "all", "base and aligned are the same")
                continue
            if not ranks:
                continue
            _say(f"{printable(choice.name)}: the exact result, in float64")
            delta = Bands(w1, w0)
            exact = leading(delta, max(ranks))
            for rank in ranks:
                yield from compare(
                    Case(choice.name, delta, rank, exact),
                    contenders,
                    workers,
                    alpha=ALPHA,
                    repeats=request.repeats,
                    limit_s=request.limit_s,
                    seed=request.seed,
                    say=_say,
                )


def _say(text: str) -> None:
    click.echo(escaped(text), err=True)


def _write(request: Request, rows: Sequence[Measured]) -> None:
    if request.table is not None:
        with _named("--csv", request.table):
            write_csv(request.table, rows)
    for path in request.pictures:
        with _named("--picture", path):
            picture(rows, request.shares, path)


@contextmanager
def _named(option: str, path: Path) -> Iterator[None]:
    """Says that a file was written, or which one was not."""
    try:
        yield
    except OSError as problem:
        raise OptionError(
            f"{option} {printable(path)}: cannot be written: {problem.strerror}. Choose another file"
        ) from problem
    _say(f"wrote {printable(path)}")


def write_csv(path: Path, rows: Sequence[Measured]) -> None:
    """One line for each solver, value of its knob, matrix and rank; the heads are the fields of Measured."""
    from lox_stream.comparing import Measured

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measured)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _show(request: Request, rows: Sequence[Measured], out: Sequence[LeftOut]) -> None:
    from lox_stream.comparing import fastest, ranking, verdict

    verdicts = {f"{share:.10g}": verdict(rows, share) for share in request.shares}
    if request.as_json:
        echo_json(
            {
                "alpha": ALPHA,
                "rows": [asdict(row) for row in rows],
                "left_out": [asdict(one) for one in out],
                "ranking": {f"{share:.10g}": ranking(rows, share) for share in request.shares},
                "verdicts": verdicts,
            }
        )
        return
    console = console_of()
    share = request.shares[0]
    for matrix in dict.fromkeys((row.case, row.rank) for row in rows):
        some = [row for row in rows if (row.case, row.rank) == matrix]
        console.print(solver_table(some, fastest(some, share), share))
    for one in out:
        click.echo(escaped(f"left out: {one.solver} on {printable(one.case)}: {one.why}"))
    if request.plot and rows:
        click.echo(terminal_plot(rows, console.width, colour=console.is_terminal and not console.no_color))
    for sentence in verdicts.values():
        click.echo(sentence[:1].upper() + sentence[1:] + ".")
