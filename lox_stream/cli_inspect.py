"""`lox-stream inspect`: what a checkpoint holds, and what `run` would do with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lox_stream.hub import local, planned_first
from lox_stream.inspecting import inspect_checkpoint, inspection_summary
from lox_stream.messages import echo_json, warn
from lox_stream.options import Options
from lox_stream.recipes import read_recipe
from lox_stream.signals import Interruption


def look(path: Path, recipe: Path | None, *, split_fused: bool, as_json: bool) -> int:
    """Show a checkpoint; returns the exit code, raises CheckpointError, and OptionError for the recipe."""
    with Interruption(lambda: "stopped"), planned_first(path) as headers:
        options = Options() if recipe is None else Options(**read_recipe(recipe))
        options = replace(options, split_fused=options.split_fused or split_fused)
        seen = inspect_checkpoint(local(path, shown=True) if headers is None else headers[0], options)
        seen = replace(seen, path=path) if headers is not None else seen
        if as_json:
            echo_json(inspection_summary(seen))
        else:
            from lox_stream.rendering import console_of, inspection_tables

            console = console_of()
            for table in inspection_tables(seen):
                console.print(table)
        warn(seen.warnings)
    return 0
