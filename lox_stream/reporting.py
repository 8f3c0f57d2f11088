"""A report as one HTML file that needs nothing else, out of an analysis or of the manifest of a finished run.

The page is report.html beside this module, with places for text and for data. What comes from a model's files is
escaped here where it is text, and becomes text there where it is data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from typing import Any

from lox_stream.names import printable


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of every matrix."""

    label: str
    kind: str  # "percent" | "count" | "number"


@dataclass(frozen=True, slots=True)
class Row:
    """One matrix."""

    name: str
    module: str  # its name without numbers: a line of the map
    layer: int | None  # a column of the map
    shape: str
    dtype: str
    figures: tuple[float | int | None, ...]  # one for each metric
    values: tuple[float, ...]  # leading singular values
    curve: tuple[float, ...] = ()  # energy in 1, 2, ... directions
    edge: float | None = None  # of noise, among the singular values
    cells: tuple[tuple[int, float, str, float | None], ...] = ()  # rank, alpha, rounding, retention
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """What a report says."""

    title: str
    facts: tuple[tuple[str, str], ...]
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]
    command: str
    options: Mapping[str, Any]
    metrics: tuple[Metric, ...]
    rows: Sequence[Row]
    grid: Sequence[tuple[int, float, str, float | None]] = ()  # rank, alpha, rounding, retention


def page_text(page: Page) -> str:
    """The whole file."""
    data = {
        "metrics": [{"label": metric.label, "kind": metric.kind} for metric in page.metrics],
        "rows": [asdict(row) | {"name": printable(row.name), "module": printable(row.module)} for row in page.rows],
        "grid": page.grid,
    }
    places = {
        "title": _text(page.title),
        "facts": "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in page.facts),
        "sentences": _items(page.sentences),
        "warnings": f'<ul class="warnings">{_items(page.warnings)}</ul>' if page.warnings else "",
        "command": _text(page.command),
        "options": _text(json.dumps(page.options, indent=2)),
        "data": _embedded(data),
    }
    text = resources.files("lox_stream").joinpath("report.html").read_text("utf-8")
    parts = text.split("{{")
    found = [parts[0]]
    for part in parts[1:]:
        name, rest = part.split("}}", 1)
        found += [places[name], rest]
    return "".join(found)


def _items(texts: Iterable[str]) -> str:
    return "".join(f"<li>{_text(text)}</li>" for text in texts)


def _text(text: str) -> str:
    """As HTML shows it; line breaks stay."""
    return escape("\n".join(printable(line) for line in text.split("\n")))


def _embedded(data: Any) -> str:
    """JSON that cannot end the script that it lies in."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")
