"""`lox-stream demo`: makes a pair, runs, and says in words what happened."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Group

from lox_stream.names import counted
from lox_stream.rendering import cell, console_of, percent, summary_table, table_of
from lox_stream.showing import display, size_text, time_text
from lox_stream.signals import Interruption

if TYPE_CHECKING:
    from lox_stream.demo import Demonstration


def demonstrate(keep: Path | None) -> int:
    """Run the demo in `keep`, or in a temporary folder that is removed, also when it is stopped."""
    folder = Path(tempfile.mkdtemp(prefix="lox-stream-demo-")) if keep is None else keep

    def clean() -> str:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
        return "stopped"

    with Interruption(clean):
        try:
            _show(_run(folder), kept=keep is not None)
        finally:
            clean()
    return 0


def _run(folder: Path) -> Demonstration:
    click.echo("Making a small pair of models: a Llama of two layers, before and after alignment ...", err=True)
    from lox_stream.demo import run_demo, timed_pair

    pair, making_s = timed_pair(folder)
    with display(console_of(stderr=True), "extrapolating", quiet=False) as show:
        return run_demo(folder, pair, making_s=making_s, progress=show)


def _show(seen: Demonstration, *, kept: bool) -> None:
    console = console_of()
    summary, total = seen.summary, seen.summary.totals
    console.print(summary_table(summary, kept=kept))
    console.print()
    passes = total.passes / max(total.extrapolated, 1)
    for line in (
        f"The pair has {seen.parameters / 1e6:.1f} million parameters in bfloat16, {size_text(total.n_bytes)} a side; "
        f"made in {time_text(seen.making_s)}.",
        f"For each of {counted(total.extrapolated, 'matrix', 'matrices')} the 6 leading singular triplets of "
        f"aligned - base were found, in {passes:.0f} passes over it on average; 1.25 times that part was added to "
        "aligned, and the sum rounded once.",
        f"{counted(total.copied, 'vector')} were copied. {percent(seen.changed)} of the matrices' elements differ from "
        "the aligned model's; the others moved by less than half a rounding step.",
    ):
        console.print(cell(line))
    console.print()
    console.print(_beside(seen))
    comparison = seen.comparison
    console.print(
        cell(
            f"The same matrix by a full SVD in float64: {percent(comparison.share, 2)} of its {comparison.elements:,} "
            f"elements have the same bits. It took {time_text(comparison.elapsed_s)} on one core, lox-stream "
            f"{seen.elapsed_s:.2f} s beside other tensors."
        )
    )
    if kept:
        console.print(cell(f"Kept: {seen.base}, {seen.aligned} and {summary.out}."))
    else:
        console.print("The pair and the result were temporary; keep them with --keep DIR.")


def _beside(seen: Demonstration) -> Group:
    exact, facts = seen.comparison.singular_values, seen.facts
    rows = [
        (str(number), f"{value:.7g}", f"{radius:.0e}", f"{right:.7g}")
        for number, (value, radius, right) in enumerate(
            zip(facts.singular_values, facts.radius, exact, strict=False), 1
        )
    ]
    title = f"Leading singular values of aligned - base, {seen.comparison.name} ({facts.passes} passes)"
    return table_of(title, ("", "lox-stream", "within", "full SVD"), rows, right=(0, 1, 2, 3))
