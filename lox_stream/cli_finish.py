"""`lox-stream finish`: the parts of a run become one output."""

from __future__ import annotations

from pathlib import Path

from lox_stream.errors import Cancelled
from lox_stream.messages import NOT_CONVERGED, echo_json, warn
from lox_stream.options import Options
from lox_stream.signals import Interruption


def put_together(
    out: Path, base: Path | None, aligned: Path | None, machine: Options, *, as_json: bool, quiet: bool
) -> int:
    """Do it, show what came of it, and return the exit code; raises LoxError."""
    from lox_stream.cli_run import summary_document
    from lox_stream.finishing import finish
    from lox_stream.rendering import console_of, summary_table
    from lox_stream.showing import display

    with Interruption(lambda: "stopped: go on with the same command") as interruption:
        try:
            with display(console_of(stderr=True), "finishing", quiet=quiet) as show, interruption.gently():
                summary = finish(
                    out, base=base, aligned=aligned, machine=machine, progress=show, cancel=interruption.cancel
                )
        except Cancelled:
            assert interruption.number is not None, "nobody else cancels"
            interruption.leave(interruption.number)
    code = NOT_CONVERGED if summary.totals.not_converged else 0
    if as_json:
        echo_json(summary_document(summary, code))
    elif not quiet:
        console_of().print(summary_table(summary))
    if not quiet:
        warn(summary.warnings)
    return code
