"""The pictures of docs/how.md and docs/choosing.md: python docs/tools/draw_pictures.py ANALYSIS.json FOLDER

ANALYSIS.json is what `lox-stream analyze --out` wrote. `make pictures` draws those that are committed, of the real
pair.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.figure import Figure

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "lox-stream", "font.family": "sans-serif", "font.size": 9}
SIZE = (5.6, 3.2)  # inches
TAKEN, LEFT = "#00695c", "#b0bec5"
Matrix = dict[str, Any]


def spectrum(axes: Any, found: dict[str, Any]) -> None:
    """The leading singular values of one attention matrix in the middle of the model, and the edge of noise."""
    k = found["options"]["rank"]
    named = [one for one in found["matrices"] if one["name"].endswith("self_attn.o_proj.weight")]
    one = named[len(named) // 2]
    values = one["singular_values"]
    numbers = range(1, len(values) + 1)
    axes.bar(numbers, values, color=[TAKEN if number <= k else LEFT for number in numbers])
    axes.axhline(one["noise"]["edge"], color="black", linewidth=0.8, linestyle="--")
    axes.annotate(
        "as far as noise would reach", (len(values), one["noise"]["edge"]), (0, 4), ha="right", va="bottom",
        textcoords="offset points",
    )  # fmt: skip
    axes.annotate(
        f"the {k} that LoX takes:\n{one['energy'][k - 1]:.0%} of the energy", (k, values[1]), color=TAKEN, va="center"
    )
    axes.set(title=one["name"], xlabel="singular value of W_aligned - W_base", ylabel="size")


def energy(axes: Any, found: dict[str, Any]) -> None:
    """What share of a difference its first directions hold."""
    lines(axes, found, lambda one: range(1, len(one["energy"]) + 1), lambda one: one["energy"])
    axes.axvline(found["options"]["rank"], color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="leading directions", ylabel="share of the energy", ylim=(0, None))


def retention(axes: Any, found: dict[str, Any]) -> None:
    """What rounding leaves of an update of the rank asked for."""

    def left(one: Matrix, rounding: str, of: str) -> list[float]:
        rows = [row for row in one["retention"] if row["rounding"] == rounding]
        return [row[of] for row in rows if row["rank"] == found["options"]["rank"]]

    lines(axes, found, lambda one: left(one, "nearest", "alpha"), lambda one: left(one, "nearest", "retention"))
    one = found["matrices"][0]
    axes.plot(left(one, "stochastic", "alpha"), left(one, "stochastic", "retention"), "k--", label="all, stochastic")
    axes.axvline(found["options"]["alpha"], color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="alpha", ylabel="update left after rounding", ylim=(0, 1.05))


def lines(axes: Any, found: dict[str, Any], x: Callable[[Matrix], Sequence[float]], y: Callable[[Matrix], Any]) -> None:
    """A line for each kind of matrix: the median over the layers that hold one."""
    modules: dict[str, list[Matrix]] = {}
    for one in found["matrices"]:
        modules.setdefault(one["module"].removesuffix(".weight").split("*.")[-1].removeprefix("model."), []).append(one)
    for name, some in modules.items():
        middle = [median(values) for values in zip(*map(y, some), strict=False)]
        axes.plot(x(some[0])[: len(middle)], middle, label=name)


def draw(found: dict[str, Any], folder: Path) -> None:
    for picture in (spectrum, energy, retention):
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=SIZE, layout="constrained")
            axes = figure.add_subplot()
            picture(axes, found)
            if axes.get_legend_handles_labels()[0]:
                figure.legend(loc="outside right center", frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
            figure.savefig(folder / f"{picture.__name__}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
