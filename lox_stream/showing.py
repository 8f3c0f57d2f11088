"""How far a command is, on stderr: a bar on a terminal, plain lines every few seconds elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from lox_stream.names import printable

LINE_EVERY_S = 5.0


class Reach(Protocol):
    """How far it is; `lox_stream.Progress` is one, which is not imported here because torch comes with it."""

    @property
    def done_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def resumed_bytes(self) -> int: ...  # of done_bytes, not done by this session: no part of the rate
    @property
    def working(self) -> tuple[str, ...]: ...
    @property
    def elapsed_s(self) -> float: ...


Show = Callable[[Reach], None]


def size_text(n_bytes: float) -> str:
    """Three digits and a decimal unit: `1.23 GB`, as disks and rates are counted."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def budget_text(n_bytes: int) -> str:
    """A memory size in binary units, as budgets are given: `4 GiB`, `1.3 MiB`."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB" if size < 1000 else f"{size:.0f} GiB"


def time_text(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def rate_bps(reach: Reach) -> float | None:
    """Bytes a second of this session; None before the first."""
    fresh = reach.done_bytes - reach.resumed_bytes
    return fresh / reach.elapsed_s if fresh > 0 and reach.elapsed_s > 0 else None


def facts_text(reach: Reach) -> str:
    """`1.2 of 2.2 GB, 412 MB/s, 2.4 s left`."""
    text = f"{size_text(reach.done_bytes)} of {size_text(reach.total_bytes)}"
    rate = rate_bps(reach)
    if rate is None:
        return text
    left = time_text((reach.total_bytes - reach.done_bytes) / rate)
    return f"{text}, {size_text(rate)}/s, {left} left"


def share_done(reach: Reach) -> float:
    return reach.done_bytes / reach.total_bytes if reach.total_bytes else 1.0


@contextmanager
def display(console: Console, label: str, *, quiet: bool) -> Iterator[Show]:
    """The callable that shows progress while the context lasts; `console` is that of stderr."""
    if quiet:
        yield lambda reach: None
    elif console.is_terminal and not console.is_dumb_terminal and sys.stderr.isatty():
        with _bar(console, label) as show:
            yield show
    else:
        yield _Lines(sys.stderr, label)


class _Lines:
    """For logs: a line now and then."""

    def __init__(self, stream: TextIO, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._label, self._clock = stream, label, clock
        self._due_s = clock() + LINE_EVERY_S

    def __call__(self, reach: Reach) -> None:
        if self._clock() < self._due_s:
            return
        self._due_s = self._clock() + LINE_EVERY_S
        working = f", {printable(reach.working[0])}" if reach.working else ""
        print(
            f"{self._label}: {share_done(reach):.0%}, {facts_text(reach)}{working}",
            file=self._stream,
            flush=True,
        )


class _Working(ProgressColumn):
    """The tensor in work, cut to what the line has left; a Text, so that a name is no markup."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["working"]), no_wrap=True, overflow="ellipsis", style="dim")


@contextmanager
def _bar(console: Console, label: str) -> Iterator[Show]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[facts]}", markup=False, table_column=Column(no_wrap=True)),
        _Working(table_column=Column(no_wrap=True, ratio=1)),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        task = progress.add_task(label, total=1.0, facts="", working="")

        def show(reach: Reach) -> None:
            working = printable(reach.working[0]) if reach.working else ""
            progress.update(task, completed=share_done(reach), facts=facts_text(reach), working=working)

        yield show
