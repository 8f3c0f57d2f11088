"""`lox-stream doctor`: a table of what there is, and what to do about the rest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from lox_stream import __version__
from lox_stream.installed import Finding, packages
from lox_stream.messages import ERROR, echo_json
from lox_stream.rendering import console_of, table_of


def examine(folder: Path, *, as_json: bool) -> int:
    """Show what was found; the exit code is 1 where a run cannot work."""
    found = list(packages())
    broken = any(finding.state == "missing" for finding in found)
    if not broken:
        from lox_stream.doctor import findings

        found += findings(folder)
    if as_json:
        echo_json({"lox-stream": __version__, "ok": not broken, "findings": [asdict(finding) for finding in found]})
    else:
        console_of().print(table_of(f"lox-stream {__version__}", ("", "", "found", "what to do"), map(_row, found)))
    return ERROR if broken else 0


def _row(finding: Finding) -> tuple[str, str, str, str]:
    return finding.what, finding.state, finding.found, finding.way_out
