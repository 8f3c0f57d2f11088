"""An analysis as figures for a paper, each as PNG and as SVG, and a landscape as a map of each number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lox_stream.analysed import Finding, grouped, retained
from lox_stream.charts import MARKERS
from lox_stream.grids import Place
from lox_stream.landscape_file import Landscape, values_of
from lox_stream.names import printable

if TYPE_CHECKING:
    from lox_stream.analysing import Analysis

FORMATS = ("png", "svg")
COLUMN = 3.4  # inches: of a page with two
MOST_LINES = 10


def figures_of(found: Analysis, folder: Path) -> Iterator[Path]:
    """Write each figure into the folder, and yield the files as they are written."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    changed = [one for one in found.findings if one.spectrum is not None]
    drawings: dict[str, Callable[[Any, Analysis, Sequence[Finding]], None]] = {
        "spectra": _spectra,
        "energy": _energy,
        "retention": _retention,
        "layers": _layers,
    }
    for name, draw in drawings.items():
        figure = Figure(figsize=(2 * COLUMN, COLUMN * 1.2) if name == "layers" else (COLUMN, COLUMN * 0.8))
        figure.set_layout_engine("constrained")
        draw(figure.add_subplot(), found, changed)
        for kind in FORMATS:
            path = folder / f"{name}.{kind}"
            figure.savefig(path, dpi=300, metadata={"Date": None} if kind == "svg" else {})
            yield path


def _modules(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Those with the most energy, by what a matrix is in each layer."""
    groups = grouped(findings, lambda one: one.module)
    ranked = sorted(groups.items(), key=lambda group: -math.fsum(one.delta_norm**2 for one in group[1]))
    return dict(ranked[:MOST_LINES])


def _label(module: str) -> str:
    """Its last words: `mlp.up_proj`; what matplotlib would read as mathematics is escaped."""
    words = [word for word in printable(module).split(".") if word not in ("*", "weight", "model", "layers")]
    return ".".join(words[-2:]).replace("$", r"\$") or "matrix"


def _lines(axes: Any, findings: Sequence[Finding], values: Callable[[Finding], Sequence[float]]) -> None:
    """The median over layers, a line for each module."""
    for i, (module, some) in enumerate(_modules(findings).items()):
        series = [values(one) for one in some]
        length = min(map(len, series))
        middle = [median(one[k] for one in series) for k in range(length)]
        axes.plot(range(1, length + 1), middle, color=f"C{i}", linewidth=1, label=_label(module))
    axes.tick_params(which="both", labelsize=7)
    axes.legend(fontsize=5, frameon=False)


def _spectra(axes: Any, found: Analysis, findings: Sequence[Finding]) -> None:
    del found
    _lines(
        axes, findings, lambda one: [s / one.spectrum.values[0] for s in one.spectrum.values] if one.spectrum else []
    )
    axes.set(yscale="log")
    axes.set_xlabel("number", fontsize=8)
    axes.set_ylabel("singular value / largest", fontsize=8)


def _energy(axes: Any, found: Analysis, findings: Sequence[Finding]) -> None:
    _lines(axes, findings, lambda one: one.spectrum.curve if one.spectrum else [])
    axes.axvline(found.asked.options.rank, color="grey", linewidth=0.7, linestyle="dotted")
    axes.set_xlabel("leading directions", fontsize=8)
    axes.set_ylabel("share of the energy", fontsize=8)


def _retention(axes: Any, found: Analysis, findings: Sequence[Finding]) -> None:
    alphas = found.asked.alphas
    for i, k in enumerate(found.asked.ranks):
        for rounding, style in (("nearest", "-"), ("stochastic", "--")):
            left = [retained(findings, k, alpha, rounding) for alpha in alphas]  # type: ignore[arg-type]
            label = f"rank {k}" if rounding == "nearest" else None
            axes.plot(
                alphas,
                [math.nan if share is None else share for share in left],
                color=f"C{i}",
                linestyle=style,
                linewidth=1,
                marker=MARKERS[i % len(MARKERS)],
                markersize=3,
                label=label,
            )
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6, frameon=False)
    axes.set_xlabel("alpha (dashed: stochastic rounding)", fontsize=8)
    axes.set_ylabel("update left after rounding", fontsize=8)


def _layers(axes: Any, found: Analysis, findings: Sequence[Finding]) -> None:
    from matplotlib.ticker import MaxNLocator

    k = found.asked.options.rank
    layered = [one for one in findings if one.layer is not None] or list(findings)
    modules = list(dict.fromkeys(one.module for one in layered))
    layers = sorted({one.layer or 0 for one in layered})
    cells: dict[tuple[str, int], list[float]] = {}
    for one in layered:
        cells.setdefault((one.module, one.layer or 0), []).append(one.spectrum.energy(k) if one.spectrum else 0.0)
    grid = [
        [sum(some) / len(some) if (some := cells.get((module, layer))) else math.nan for layer in layers]
        for module in modules
    ]
    drawn = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(modules)), [_label(module) for module in modules], fontsize=6)
    axes.tick_params(labelsize=6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer", fontsize=8)
    axes.figure.colorbar(drawn, ax=axes).set_label(f"energy in {k} directions", fontsize=7)


def picture_of(found: Landscape, path: Path) -> None:
    """Write a landscape as a PNG or SVG: a map of each number that was judged, with the three models in it."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    maps = dict(list(values_of(found.points).items())[:MOST_LINES])
    figure = Figure(figsize=(COLUMN * 1.2 * len(maps), COLUMN), layout="constrained")
    for number, (name, values) in enumerate(maps.items(), 1):
        _map(figure.add_subplot(1, len(maps), number), found, name, values)
    figure.savefig(path, dpi=300, metadata={"Date": None} if path.suffix == ".svg" else {})


def _map(axes: Any, found: Landscape, name: str, values: Mapping[Place, float]) -> None:
    """A cell for each point, whose borders lie halfway to the next; what lies beyond the grid is not marked."""
    columns, rows = _borders(found.xs), _borders(found.ys)
    cells = [[values.get((x, y), math.nan) for x in found.xs] for y in found.ys]
    drawn = axes.pcolormesh(columns, rows, cells, cmap="viridis")
    for label, x, y in (("aligned", 0.0, 0.0), ("LoX", 1.0, 0.0), ("fine-tuned", found.axes.c, 1.0)):
        if columns[0] <= x <= columns[-1] and rows[0] <= y <= rows[-1]:
            axes.plot(x, y, marker="o", markersize=4, color="white", markeredgecolor="black")
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.7, "linewidth": 0}
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(4, 5), fontsize=6, bbox=box)
    axes.tick_params(labelsize=6)
    axes.set_xlabel("x: LoX - aligned", fontsize=8)
    axes.set_ylabel("y: fine-tuned - aligned, across x", fontsize=8)
    bar = axes.figure.colorbar(drawn, ax=axes)
    bar.ax.tick_params(labelsize=6)
    bar.set_label(printable(name).replace("$", r"\$"), fontsize=7)


def _borders(places: Sequence[float]) -> list[float]:
    """Of cells around places; a lone one is 1 wide.

    >>> _borders((0.0, 1.0, 3.0)), _borders((2.0,))
    ([-0.5, 0.5, 2.0, 4.0], [1.5, 2.5])
    """
    if len(places) == 1:
        return [places[0] - 0.5, places[0] + 0.5]
    middles = [(a + b) / 2 for a, b in pairwise(places)]
    return [2 * places[0] - middles[0], *middles, 2 * places[-1] - middles[-1]]
