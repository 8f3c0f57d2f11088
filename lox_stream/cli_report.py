"""`lox-stream report`: the HTML page of a finished run, or of an analysis."""

from __future__ import annotations

import json
from pathlib import Path

from lox_stream.cli_analyze import DOCUMENT, require_new, written
from lox_stream.errors import OutputError
from lox_stream.journal import finite
from lox_stream.manifest import read_manifest
from lox_stream.names import printable
from lox_stream.output_rules import MANIFEST
from lox_stream.pages import page_of_analysis, page_of_run
from lox_stream.recording import FORMAT
from lox_stream.reporting import Page, page_text
from lox_stream.verifying import folder_of


def write_report(out: Path, report: Path | None, *, quiet: bool) -> int:
    """Write the page of what lies in `out`, and return the exit code."""
    page = _page_of(out)
    target = report if report is not None else Path(f"{folder_of(out).resolve().name}-report.html")
    require_new(target, "--report")
    written(target, page_text(page), quiet=quiet)
    return 0


def _page_of(out: Path) -> Page:
    if not out.exists():
        raise OutputError(
            f"{printable(out)}: no such file or folder, expected an output or an analysis. Check the path"
        )
    document = out / DOCUMENT if out.is_dir() else out
    if document.is_file() and document.suffix == ".json" and document.name != MANIFEST:
        return _page_of_document(document)
    try:
        return page_of_run(read_manifest(folder_of(out)))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise OutputError(
            f"{printable(out)}: its manifest lacks what a report shows ({printable(str(error))}), expected one of a "
            "finished run. Check it with `lox-stream verify`"
        ) from error


def _page_of_document(path: Path) -> Page:
    """Of an analysis as it was written; raises OutputError."""
    try:
        found = finite(json.loads(path.read_text("utf-8")))
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']}")
        return page_of_analysis(found)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise OutputError(
            f"{printable(path)}: is no analysis of this version: {printable(str(error))}; expected what `lox-stream "
            "analyze --out` writes. Make it again"
        ) from error
