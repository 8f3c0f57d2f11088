"""What every benchmark here shares: timings told by their middle, the machine they were taken on, and how results end:
tables for people, then one JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

VECTOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
ROOT = Path(__file__).parents[1]


class WrongResult(Exception):
    """What was timed does not compute what it should: it has no speed."""


@dataclass(slots=True)
class Timing:
    """Seconds of the same work done several times."""

    samples: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)  # of all threads; far over or under wall x cores: look for why

    def take(self, work: Callable[[], object]) -> None:
        started, cpu_started = time.perf_counter(), time.process_time()
        work()
        self.add(time.perf_counter() - started, time.process_time() - cpu_started)

    def add(self, elapsed_s: float, cpu_s: float) -> None:
        self.samples.append(elapsed_s)
        self.cpu_s.append(cpu_s)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, share: float) -> float:
        """The sample that `share` of the samples do not exceed, interpolated."""
        ordered = sorted(self.samples)
        place = share * (len(ordered) - 1)
        low = ordered[int(place)]
        return low + (ordered[min(int(place) + 1, len(ordered) - 1)] - low) * (place % 1)

    def record(self) -> dict[str, Any]:
        """For the JSON line; seconds."""
        return {
            "median_s": round(self.median, 6),
            "p20_s": round(self.quantile(0.2), 6),
            "p80_s": round(self.quantile(0.8), 6),
            "cpu_s": round(statistics.median(self.cpu_s), 6),
            "repeats": len(self.samples),
        }

    def __str__(self) -> str:
        """`103 ms (98 to 120)`: the median, p20 and p80."""
        unit, scale = ("s", 1.0) if self.median >= 1 else ("ms", 1e3)
        middle, low, high = (value * scale for value in (self.median, self.quantile(0.2), self.quantile(0.8)))
        digits = 2 if middle < 10 else 1 if middle < 100 else 0
        spread = f" ({low:.{digits}f} to {high:.{digits}f})" if len(self.samples) > 1 else ""
        return f"{middle:.{digits}f} {unit}{spread}"


def alternate(repeats: int, works: Mapping[str, Callable[[], object]], *, warm_up: bool = True) -> dict[str, Timing]:
    """Time each of `works` in turn, ABAB and not AABB: whatever else the machine does falls on all of them."""
    if warm_up:
        for work in works.values():
            work()
    timings = {name: Timing() for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            timings[name].take(work)
    return timings


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def others_share(wait_s: float = 0.5) -> float:
    """Share of all cores that other work takes while we wait; 0.0 where /proc does not tell."""
    before = _core_ticks()
    time.sleep(wait_s)
    busy, total = (after - start for after, start in zip(_core_ticks(), before, strict=True))
    return busy / total if total else 0.0


def busy_s() -> float:
    """Seconds that all cores together have worked since boot, for whomever, the kernel's own threads too."""
    return _core_ticks()[0] / os.sysconf("SC_CLK_TCK")


def _core_ticks() -> tuple[int, int]:
    """(busy, all) ticks of all cores since boot; waiting for a disk is not busy, time that a host took away is."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return 0, 0
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def machine() -> dict[str, Any]:
    """The machine, the versions and the commit that the figures belong to."""
    model, flags = _cpu()
    return {
        "cpu": model,
        "flags": [flag for flag in VECTOR_FLAGS if flag in flags],
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lox_stream": version("lox-stream"),
        "commit": _commit(),
    }


def _cpu() -> tuple[str, set[str]]:
    """Model name and flags, as Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor(), set()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return values.get("model name", platform.machine()), set(values.get("flags", values.get("Features", "")).split())


def _commit() -> str:
    """Short hash of HEAD, "+" after it where files differ from it; "unknown" outside a repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


@dataclass(frozen=True, slots=True)
class Table:
    """Figures for people: the first column is a name, the others are numbers."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        lines = [self.heads, ("---", *("---:" for _ in self.heads[1:])), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join((f"## {self.title}", table, *self.notes)) + "\n"

    def show(self, console: Console) -> None:
        table = RichTable(title=self.title, title_justify="left")
        for number, head in enumerate(self.heads):
            table.add_column(Text(head), justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        console.print(table)
        for note in self.notes:
            console.print(Text(note))


def finish(benchmark: str, tables: Sequence[Table], results: Mapping[str, Any], file: Path | None = None) -> None:
    """Print the tables and then one JSON line; also `save` them to `file`."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables:
        table.show(console)
    record = record_of(benchmark, results)
    if file is not None:
        save(file, record, tables)
    print(json.dumps(record), flush=True)


def record_of(benchmark: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Results, with when, by which command and on which machine they were taken."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"benchmark": benchmark, "time": when, "command": command(), "machine": machine(), **results}


def save(file: Path, record: Mapping[str, Any], tables: Sequence[Table]) -> None:
    """The tables as Markdown, the record beside them as .json; a run that is killed leaves the earlier ones whole."""
    markdown = "\n".join((_preamble(record), *(table.markdown() for table in tables)))
    for path, text in ((file, markdown), (file.with_suffix(".json"), json.dumps(record, indent=2) + "\n")):
        replace(path, text)


def replace(file: Path, text: str) -> None:
    """Write the whole of a file or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(text)
    fresh.replace(file)


def command() -> str:
    """The command line as typed from the repository's root."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    return shlex.join(["python", str(name), *sys.argv[1:]])


def _preamble(record: Mapping[str, Any]) -> str:
    about = record["machine"]
    lines = [
        f"# {record['benchmark']}, {record['time'][:10]}",
        f"    {record['command']}",
        f"{about['cpu']} ({', '.join(about['flags'])}), {about['cores']} cores, {about['memory_gib']} GiB; "
        f"{about['system']}; Python {about['python']}, torch {about['torch']}, lox-stream {about['lox_stream']} at "
        f"{about['commit']}. {record.get('note', 'Medians, in brackets p20 to p80.')}",
    ]
    return "\n\n".join(lines) + "\n"


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None, repeats: int) -> argparse.Namespace:
    """The arguments, with --repeat (default `repeats`) and --results, which every benchmark of times has."""
    parser.add_argument("--repeat", type=int, default=repeats, help="repetitions (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="also write a Markdown file, and the JSON beside it")
    args = parser.parse_args(argv)
    if args.repeat < 1:
        parser.error(f"--repeat is {args.repeat}, expected 1 or more")
    return args


def say(message: str) -> None:
    """What is going on, on stderr."""
    print(message, file=sys.stderr, flush=True)
