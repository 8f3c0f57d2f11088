"""What every benchmark here shares: timings told by their middle, the machine they were taken on, and the last line."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

VECTOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


class WrongResult(Exception):
    """What was timed does not compute what it should: it has no speed."""


@dataclass(slots=True)
class Timing:
    """Seconds of the same work done several times."""

    samples: list[float] = field(default_factory=list)

    def take(self, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        self.samples.append(time.perf_counter() - started)

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
            "repeats": len(self.samples),
        }

    def __str__(self) -> str:
        """`103 ms (98 to 120)`: the median, p20 and p80."""
        unit, scale = ("s", 1.0) if self.median >= 1 else ("ms", 1e3)
        middle, low, high = (value * scale for value in (self.median, self.quantile(0.2), self.quantile(0.8)))
        digits = 1 if middle < 100 else 0
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


def machine() -> dict[str, Any]:
    """The machine, the versions and the commit that the figures belong to."""
    model, flags = _cpu()
    return {
        "cpu": model,
        "flags": [flag for flag in VECTOR_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
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
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table for people; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    print(f"\n{title}")
    for row in (heads, ["-" * width for width in widths], *rows):
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())


def print_record(benchmark: str, results: Mapping[str, Any]) -> None:
    """One JSON line, the last one on stdout."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(json.dumps({"benchmark": benchmark, "time": when, "machine": machine(), **results}), flush=True)
