"""Time against the share of elements that differ, both logarithmic, one line a solver: a file, or the terminal."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lox_stream.errors import OptionError
from lox_stream.installed import way_to
from lox_stream.names import printable

if TYPE_CHECKING:
    from lox_stream.comparing import Measured

SUFFIXES = (".png", ".svg")
LEAST = 1e-6  # share that is drawn for none at all
MARKERS = "ox^sD*vP"
OURS = "lox-stream"


def check_picture(path: Path, made: Path | None = None) -> None:
    """Raise OptionError now for a picture that could not be written later; the folder `made` will be there by then."""
    if path.suffix not in SUFFIXES:
        raise OptionError(f"--picture {path}: expected a name that ends in .png or .svg")
    if made is None or made.exists() or path.absolute().parent != made.absolute():
        check_file(path, "--picture")
    need("matplotlib", "--picture")


def check_file(path: Path, option: str) -> None:
    """Raise OptionError now for a file that could not be written later."""
    if path.is_dir():
        raise OptionError(f"{option} {path}: is a folder, expected the name of a file")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"{option} {path}: the folder does not exist. Make it first")


def need(package: str, option: str) -> None:
    """Raise OptionError where an optional package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise OptionError(f"{option} needs {package}, which is not installed: {way_to('bench')}")


def panels(rows: Sequence[Measured]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """For each matrix and rank, by its title: (seconds, differing share) of each solver, from cheap to dear."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        shape = f"{row.m} x {row.n}"
        case = printable(row.case)
        title = case if shape in case else f"{case}, {shape} {row.dtype}, rank {row.rank}"
        found.setdefault(title, {}).setdefault(row.solver, []).append((row.elapsed_s, max(row.differing, LEAST)))
    return found


def picture(rows: Sequence[Measured], shares: Sequence[float], path: Path) -> None:
    """Write a PNG or SVG, a panel for each matrix."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state
    from matplotlib.ticker import NullFormatter

    all_panels = panels(rows)
    across = min(len(all_panels), 3)
    down = -(-len(all_panels) // across)
    figure = Figure(figsize=(5.2 * across, 4.2 * down), layout="constrained")
    solvers = list(dict.fromkeys(row.solver for row in rows))
    for number, (title, lines) in enumerate(all_panels.items(), 1):
        axes = figure.add_subplot(down, across, number)
        for solver, points in lines.items():
            i = solvers.index(solver)
            mine = solver == OURS
            axes.plot(
                *zip(*points, strict=True),
                color="black" if mine else f"C{i}",
                linewidth=2 if mine else 1,
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                label=solver,
            )
        for share in shares:
            axes.axhline(1 - share, color="grey", linewidth=0.7, linestyle="dotted")
        axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="share of elements that differ", title=title)
        axes.title.set_fontsize(9)
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {}, dpi=120)


def terminal_plot(rows: Sequence[Measured], width: int, *, colour: bool) -> str:
    """The same in characters, one plot below the other; a letter stands for each solver."""
    import plotext

    text = []
    solvers = list(dict.fromkeys(row.solver for row in rows))
    for title, lines in panels(rows).items():
        plotext.clear_figure()
        plotext.theme("clear" if not colour else "default")
        for solver, points in lines.items():
            letter = "abcdefghijklmnop"[solvers.index(solver)]
            x, y = zip(*points, strict=True)
            plotext.scatter(x, y, marker=letter, label=f"{letter} {solver}")
        plotext.xscale("log")
        plotext.yscale("log")
        plotext.title(title)
        plotext.xlabel("seconds")
        plotext.ylabel("differ")
        plotext.plotsize(min(width, 110), 26)
        built = plotext.build()
        text.append(built if colour else plotext.uncolorize(built))
    return "\n\n".join(text)
