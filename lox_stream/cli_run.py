"""`lox-stream run`: plan, carry out, show. A thin shell over `plan` and `execute`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lox_stream.errors import Cancelled, OptionError
from lox_stream.messages import NOT_CONVERGED, echo_json, escaped, warn
from lox_stream.names import listing, printable
from lox_stream.options import Options
from lox_stream.output_rules import JOURNAL
from lox_stream.planning import Plan, plan, plan_summary
from lox_stream.predicting import Prediction, parse_machine, predict
from lox_stream.showing import counted
from lox_stream.signals import Interruption

if TYPE_CHECKING:
    from lox_stream.api import Summary


@dataclass(frozen=True, slots=True)
class Request:
    """What was typed."""

    base: Path
    aligned: Path
    out: Path
    options: Options
    resume: bool
    overwrite: bool
    repair: bool
    dry_run: bool
    assume: str
    as_json: bool
    quiet: bool
    typed: tuple[str, ...]  # the command's arguments, `run` included


def carry_out(request: Request) -> int:
    """Do what was asked and return the exit code; raises LoxError."""
    if request.assume and not request.dry_run:
        raise OptionError("--assume is what --dry-run predicts with, expected both. Add --dry-run, or leave it out")
    if request.repair and request.dry_run:
        raise OptionError(
            "--repair and --dry-run are both given, expected one: `lox-stream verify` says what is damaged"
        )
    machine = parse_machine(request.assume)
    with Interruption(lambda: _stopped(request)) as interruption:
        made = plan(
            request.base,
            request.aligned,
            request.out,
            options=request.options,
            resume=request.resume,
            overwrite=request.overwrite,
            repair=request.repair,
            dry=request.dry_run,
        )
        if not request.dry_run:
            from lox_stream.device import settled

            made = settled(made)
        if not request.quiet:
            warn(made.warnings)
        if request.dry_run:
            _show_plan(request, made, predict(_still_to_do(request, made), machine))
            return 0
        try:
            summary = _execute(request, made, interruption)
        except Cancelled:
            assert interruption.number is not None, "nobody else cancels"
            interruption.leave(interruption.number)
    code = NOT_CONVERGED if summary.totals.not_converged else 0
    _show_summary(request, made, summary, code)
    return code


def _still_to_do(request: Request, made: Plan) -> Plan:
    """The plan without what an unfinished run has finished, for --resume; ResumeError if that run is another."""
    from lox_stream.resuming import resumable

    state = resumable(made)[0] if request.resume else None
    finished = state.finished if state is not None else {}
    return replace(made, steps=tuple(step for step in made.steps if step.name not in finished))


def _show_plan(request: Request, made: Plan, prediction: Prediction) -> None:
    if request.as_json:
        echo_json(plan_summary(made) | {"prediction": prediction.record()})
    elif not request.quiet:
        from lox_stream.rendering import console_of, plan_tables, prediction_table

        console = console_of()
        for table in [*plan_tables(made), prediction_table(prediction)]:
            console.print(table)
        console.print("Nothing was written (--dry-run).")


def _execute(request: Request, made: Plan, interruption: Interruption) -> Summary:
    from lox_stream.api import execute
    from lox_stream.rendering import console_of
    from lox_stream.showing import display

    label = "repairing" if request.repair else "extrapolating"
    with display(console_of(stderr=True), label, quiet=request.quiet) as show, interruption.gently():
        return execute(
            made,
            resume=request.resume,
            overwrite=request.overwrite,
            repair=request.repair,
            progress=show,
            cancel=interruption.cancel,
        )


def _show_summary(request: Request, made: Plan, summary: Summary, code: int) -> None:
    if request.as_json:
        echo_json(summary_document(summary, code))
    elif not request.quiet and summary.repaired is not None:
        click.echo(escaped(repaired_text(summary)))
    elif not request.quiet:
        from lox_stream.rendering import console_of, summary_table

        console_of().print(summary_table(summary))
    if not request.quiet:
        warn(warning for warning in summary.warnings if warning not in made.warnings)


def repaired_text(summary: Summary) -> str:
    """`repaired 1 of 291 tensors: NAME in FILE`, and what else was written again."""
    damaged = summary.repaired or ()
    if not damaged:
        ending = "; the run is finished" if summary.written_bytes else ""
        return f"nothing to repair: every byte of {summary.out} is as it was written{ending}"
    tensors = [f"{damage.name} in {damage.file}" for damage in damaged if damage.name != damage.file]
    others = [
        ("header of " if damage.file.endswith(".safetensors") else "") + damage.file
        for damage in damaged
        if damage.name == damage.file
    ]
    lines = [f"repaired {len(tensors)} of {counted(summary.totals.tensors, 'tensor')}"]
    lines[0] += f": {listing(tensors)}" if tensors else ""
    if others:
        lines.append(f"written again: {listing(others)}")
    return "\n".join(lines)


def summary_document(summary: Summary, code: int) -> dict[str, Any]:
    """A summary as JSON-able data, with its rate and the exit code."""
    moved = summary.read_bytes + summary.written_bytes
    rate = moved / summary.elapsed_s if summary.elapsed_s > 0 else None
    rest = {"out": str(summary.out), "read_and_written_bytes_per_s": rate, "exit_code": code}
    return asdict(summary) | rest


def _stopped(request: Request) -> str:
    """What a stopped run leaves, and the command that goes on."""
    command = going_on(request.typed)
    if not (request.out / JOURNAL).exists():
        return "stopped: nothing was written"
    return f"stopped: {printable(request.out)} keeps what is finished and synced. Go on with:\n  {command}"


def going_on(typed: Sequence[str]) -> str:
    """The command as it was typed, with --resume and without --overwrite, to be pasted into a shell."""
    kept = [word for word in typed if word not in ("--overwrite", "--resume")]
    return " ".join(map(quoted, [*program(), *kept, "--resume"]))


def quoted(word: str) -> str:
    """A word as a shell takes it; what a terminal would obey, or no text at all, as $'...' with hexadecimal bytes."""
    if word.isprintable():
        return shlex.quote(word)
    safe = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return "$'" + "".join(safe) + "'"


def program() -> list[str]:
    """How this program was called: `lox-stream`, a path to it, or `python -m lox_stream`."""
    called = sys.argv[0]
    if Path(called).name == "__main__.py":
        return sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    found = shutil.which("lox-stream")
    return (
        ["lox-stream"]
        if found is not None and Path(called).name == "lox-stream" and Path(called) == Path(found)
        else [called]
    )
