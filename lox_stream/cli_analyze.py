"""`lox-stream analyze`: what the difference of a pair is made of, as tables with sparklines, or as files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group

from lox_stream.errors import Cancelled, OutputError
from lox_stream.messages import NOT_CONVERGED, echo_json, escaped, warn
from lox_stream.names import counted, printable
from lox_stream.options import Options
from lox_stream.output_rules import nearest_folder
from lox_stream.rendering import console_of, percent, shape_text, table_of
from lox_stream.showing import display, time_text
from lox_stream.signals import Interruption

if TYPE_CHECKING:
    from lox_stream.analysed import Finding
    from lox_stream.analysing import Analysis
    from lox_stream.planning import Plan

BARS = "▁▂▃▄▅▆▇█"
SHOWN = 16  # singular values as bars
DOCUMENT, TABLE = "analysis.json", "analysis.csv"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for."""

    base: Path
    aligned: Path
    finetuned: Path | None
    out: Path | None
    report: Path | None
    figures: Path | None
    ladder: str | None
    rungs: tuple[int, ...]
    options: Options
    values: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    reference: bool
    as_json: bool
    quiet: bool


def carry_out(request: Request) -> int:
    """Analyse, show, and return the exit code."""
    with Interruption(lambda: _stopped(request)) as interruption:
        try:
            return _carried_out(request, interruption)
        except Cancelled:
            assert interruption.number is not None, "nobody else cancels"
            interruption.leave(interruption.number)


def _carried_out(request: Request, interruption: Interruption) -> int:
    _require_room(request)
    plans = _ladder(request)
    from lox_stream.analysing import analyze

    with display(console_of(stderr=True), "analysing", quiet=request.quiet) as show, interruption.gently():
        found = analyze(
            request.base,
            request.aligned,
            finetuned=request.finetuned,
            options=request.options,
            values=request.values,
            ranks=request.ranks,
            alphas=request.alphas,
            reference=request.reference,
            progress=show,
            cancel=interruption.cancel,
        )
    code = _climb(request, plans, interruption) if plans else 0
    if not (request.as_json or request.quiet):
        _show(found)
    if request.as_json or request.out is not None or request.report is not None:
        from lox_stream.recording import document_of

        document = document_of(found)
        if request.as_json:
            echo_json(document)
        _write(request, found, document)
    _draw(request, found)
    if not request.quiet:
        warn(found.warnings)
    return code


def _stopped(request: Request) -> str:
    """What a stopped command leaves: a ladder's folders, for all else is written at the end."""
    if request.ladder is not None:
        from lox_stream.ladder import is_begun

        if is_begun(request.ladder, request.rungs):
            return "stopped: the ladder's folders keep what is finished. Go on with the same command"
    return "stopped: nothing was written"


def _ladder(request: Request) -> list[Plan]:
    """The plans of the ladder, so that what is wrong with it is said before the work."""
    if request.ladder is None:
        return []
    from lox_stream.ladder import is_begun, plan_ladder

    return plan_ladder(
        request.base,
        request.aligned,
        request.ladder,
        request.rungs,
        options=request.options,
        resume=is_begun(request.ladder, request.rungs),
    )


def _climb(request: Request, plans: Sequence[Plan], interruption: Interruption) -> int:
    """Write the ladder; the exit code, which is that of a run."""
    from lox_stream.api import execute_all
    from lox_stream.ladder import is_begun

    assert request.ladder is not None, "there are plans of it"
    with display(console_of(stderr=True), "the ladder", quiet=request.quiet) as show, interruption.gently():
        summaries = execute_all(
            plans, resume=is_begun(request.ladder, request.rungs), progress=show, cancel=interruption.cancel
        )
    if not request.quiet:
        for summary in summaries:
            click.echo(escaped(f"wrote {summary.out}"), err=True)
        warn(dict.fromkeys(warning for summary in summaries for warning in summary.warnings))
    return NOT_CONVERGED if any(summary.totals.not_converged for summary in summaries) else 0


def _require_room(request: Request) -> None:
    """Nothing is replaced, and what cannot be written is said before the work."""
    if request.out is not None:
        out = request.out
        there = [name for name in (DOCUMENT, TABLE) if os.path.lexists(out / name)]
        if there:
            raise OutputError(f"{printable(out / there[0])}: is there already, expected none. Choose another --out")
        if out.exists() and not out.is_dir():
            raise OutputError(f"{printable(out)}: is a file, expected a folder, or a name for a new one")
        _require_writable(out)
    if request.report is not None:
        require_new(request.report, "--report")
    if request.figures is not None:
        from lox_stream.charts import need

        need("matplotlib", "--figures")
        _require_empty(request.figures)
        _require_writable(request.figures)


def _require_writable(folder: Path) -> None:
    nearest = nearest_folder(folder)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{printable(folder)}: no permission to write in {printable(nearest)}. Choose another folder")


def _require_empty(folder: Path) -> None:
    """A folder that is new or empty: nothing is replaced."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(f"--figures {printable(folder)}: expected a new or empty folder. Choose another")


def require_new(path: Path, option: str) -> None:
    """A file that is not there, in a folder that is; nothing is replaced."""
    if os.path.lexists(path):
        raise OutputError(f"{option} {printable(path)}: is there already, expected a new file. Choose another name")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{option} {printable(path)}: has no folder, expected one that is there. Make it first")
    _require_writable(path.absolute().parent)


def _write(request: Request, found: Analysis, document: dict[str, Any]) -> None:
    if request.out is not None:
        from lox_stream.files import make_folder
        from lox_stream.recording import table_text

        make_folder(request.out)
        written(request.out / TABLE, table_text(found), quiet=request.quiet)
        written(request.out / DOCUMENT, json.dumps(document, indent=1) + "\n", quiet=request.quiet)
    if request.report is not None:
        from lox_stream.pages import page_of_analysis
        from lox_stream.reporting import page_text

        written(request.report, page_text(page_of_analysis(document)), quiet=request.quiet)


def _draw(request: Request, found: Analysis) -> None:
    if request.figures is None:
        return
    from lox_stream.figures import figures_of
    from lox_stream.files import explained, make_folder

    with explained(request.figures, "write figures there", "Choose another folder, or change its permissions"):
        make_folder(request.figures)
        if not any(one.spectrum for one in found.findings):
            warn([f"{printable(request.figures)}: no figures are drawn, for there is no difference"])
            return
        for path in figures_of(found, request.figures):
            if not request.quiet:
                click.echo(escaped(f"wrote {path}"), err=True)


def written(path: Path, text: str, *, quiet: bool) -> None:
    """Write a file, and say so."""
    from lox_stream.files import explained, replace_file

    with explained(path, "write it", "Choose another folder, or change its permissions"):
        replace_file(path, text.encode(errors="backslashreplace"))
    if not quiet:
        click.echo(escaped(f"wrote {path}"), err=True)


def _show(found: Analysis) -> None:
    from lox_stream.advising import advice

    console = console_of()
    for table in (modules_table(found), retention_table(found)):
        console.print(table)
    for sentence in advice(found.findings, found.asked):
        click.echo(escaped(sentence))
    size, copied = counted(len(found.findings), "matrix", "matrices"), counted(len(found.copied), "tensor")
    click.echo(f"Looked at {size} in {time_text(found.elapsed_s)}; {copied} would be copied.")


def spark(values: Sequence[float]) -> str:
    """Numbers as bars, the largest as the highest.

    >>> spark([8, 4, 1])
    '█▄▁'
    """
    most = max(values, default=0.0)
    return "".join(BARS[min(7, max(0, round(8 * value / most) - 1))] for value in values) if most > 0 else ""


def modules_table(found: Analysis) -> Group:
    """A row for what a matrix is in each layer: `model.layers.*.mlp.up_proj.weight`."""
    k, alpha = found.asked.options.rank, found.asked.options.alpha
    from lox_stream.analysed import grouped

    groups = grouped(found.findings, lambda one: one.module)
    tuned = found.finetuned is not None
    columns = ["matrices", "count", "shape", "|delta|/|W|", f"energy {k}", f"s{k + 1}/s{k}", "stand out", "retention"]
    columns += ["R_align", "R_ft", "kept"] if tuned else []
    rows = [_row(name, some, k, alpha, tuned=tuned) for name, some in groups.items()]
    return table_of("Analysis", [*columns, "singular values"], rows, right=(1, *range(3, len(columns) + 1)))


def _row(name: str, some: Sequence[Finding], k: int, alpha: float, *, tuned: bool) -> list[object]:
    from statistics import median

    from lox_stream.analysed import energy_of, gaps_after, mean_of, retained

    changed = [one for one in some if one.spectrum is not None]
    gaps = gaps_after(changed, k)
    row: list[object] = [
        name if len(some) > 1 else some[0].name,
        len(some),
        shape_text((one.m, one.n) for one in some),
        percent(median(one.relative for one in some), 2),
        percent(energy_of(changed, k) if changed else None),
        f"{median(gaps):.2f}" if gaps else "-",
        _standing(changed),
        percent(retained(changed, k, alpha, "nearest")),
    ]
    if tuned:
        means = mean_of(one.ours for one in changed)
        known = means is not None and means.finetuned is not None
        row += [f"{means.align:.3f}" if means else "-", f"{means.finetuned:.3f}" if means and known else "-"]
        row.append(percent(means.kept) if means and known else "-")
    largest = max(changed, key=lambda one: one.delta_norm, default=None)
    return [*row, spark(largest.spectrum.values[:SHOWN]) if largest is not None and largest.spectrum else ""]


def _standing(changed: Sequence[Finding]) -> str:
    """How many directions stand out, in the median matrix; `32+` where those are all that were looked at."""
    from statistics import median_high

    counts = [(one.bulk.outliers, one.bulk.more) for one in changed if one.bulk]
    if not counts:
        return "-"
    count, more = median_high(counts)
    return f"{count}+" if more else f"{count}"


def retention_table(found: Analysis) -> Group:
    """What rounding leaves of the pair's update as a whole, over the grid of rank and alpha."""
    from lox_stream.analysed import ROUNDINGS, retained

    asked = found.asked
    rows = [
        [k, rounding, *(percent(retained(found.findings, k, alpha, rounding)) for alpha in asked.alphas)]
        for k in asked.ranks
        for rounding in ROUNDINGS
    ]
    columns = ["rank", "rounding", *(f"alpha {alpha:g}" for alpha in asked.alphas)]
    return table_of("What rounding leaves of the whole update", columns, rows, right=(0, *range(2, len(columns))))
