#!/usr/bin/env python3
"""What a GPU does with the tests, the kernels, the solver and a whole run; `gpu_day.sh` calls it.

    python benchmarks/gpu_day.py --results build/gpu/gpu.md     on a CUDA GPU, eight minutes at most
    python benchmarks/gpu_day.py --smoke                        on a CPU, tiny: that it works; its times mean nothing

Each part has a share of the time that is left; what does not fit is left out, row by row, and said. Results are written
after each part, so that whoever is killed leaves the earlier ones. Exit code 1: a test failed, or a result was wrong.

Every kernel is compared with float64 before it is timed: a wrong result has no speed. Bandwidth is that of the bytes
which a kernel has to move, against a copy within the card's memory in the same run. In the smoke form the kernels are
interpreted.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if "--smoke" in sys.argv or not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from gpu_day_basis import REAL, SMOKE, Clock, Day, Row, Rows, bandwidths
from gpu_day_kernels import kernels
from gpu_day_runs import whole_runs
from gpu_day_solvers import layer, small, solvers
from harness import ROOT, Table, WrongResult, finish, record_of, save, say

from lox_stream.errors import LoxError

SECONDS = 480.0
RESERVE_S = 15.0  # for rows that take longer than was left for them, and the results at the end
LEAST_S = 2.0  # that a row may take, or it is left out
TESTS = ("tests/test_gpu_kernels.py", "tests/test_on_card.py", "tests/test_solver_on_gpu.py")
SMOKE_TESTS = ("tests/test_solver_on_gpu.py",)  # the others are in the suite, and take minutes in the interpreter
LEFT_OUT = "left out: the time is up"


@dataclass(frozen=True, slots=True)
class Part:
    """A table: its share of the time, and its rows as they are taken."""

    title: str
    heads: tuple[str, ...]
    share: float
    rows: Callable[[Day], Rows]
    notes: tuple[str, ...] = ()


def tests(day: Day, files: tuple[str, ...], whole: tuple[str, ...], log: Path | None) -> Rows:
    """What of the files needs a GPU, then each that is `whole`; side by side with pytest-xdist, for Triton compiles."""
    taken: list[bool] = []
    several = ["-n", "8"] if day.away and find_spec("xdist") else []
    for name, words in (
        ("what needs a GPU", ["-m", "gpu", *files]),
        *((file, ["-m", "not gpu", *several, file]) for file in whole),
    ):
        yield name, partial(_tests, day, words, log, taken)
    if taken:
        passed = False if not all(taken) else True if len(taken) == 1 + len(whole) else None
        day.found("tests", f"{sum(taken)} of {1 + len(whole)} parts pass", passed)


def _tests(day: Day, words: list[str], log: Path | None, taken: list[bool]) -> Row:
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-q", *words]
    started = time.monotonic()
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(LEAST_S, day.left_s()))
        said, code = ran.stdout + ran.stderr, ran.returncode
    except subprocess.TimeoutExpired as ended:
        raw = ended.stdout or b""  # bytes, whatever was asked for
        said, code = raw if isinstance(raw, str) else raw.decode(errors="replace"), -1
    if log is not None:
        with log.open("a") as file:
            file.write(f"{' '.join(words)}\n{said}\n")
    last = (said.strip().splitlines() or ["nothing was said"])[-1].strip("= ")
    needed = "passed" if day.away else ""  # without a GPU what needs one is skipped
    taken.append(code == 0 and needed in last)
    outcome = (
        "pass" if taken[-1] else "FAIL" if code >= 0 else f"FAIL: not over after {time.monotonic() - started:.0f} s"
    )
    if not taken[-1]:
        say(f"gpu_day: {' '.join(words)}: {outcome}\n{said[-2000:]}")
    return outcome, last[:80]


def parts_of(day: Day, tests: Callable[[Day], Rows], name: str) -> tuple[Part, ...]:
    """All parts, in order."""
    copy, to_card = (day.rates[rate] / 1e9 for rate in ("copy", "host_to_device"))
    sizes = day.sizes
    return (
        Part("Tests", ("part", "outcome", "pytest said"), 0.3, tests),
        Part(
            f"Kernels on {name}, {sizes.m} x {sizes.n} bf16",
            ("kernel, columns, tile", "time", "bytes it has to move", "of a copy"),
            0.16,
            kernels,
            (f"A copy within the card's memory: {copy:.0f} GB/s.",),
        ),
        Part("Solvers", ("solver", "time", "error of the rank-k part", "outputs with the exact bits"), 0.18, solvers),
        Part("Small problems and waits", ("what", "the one", "the other", "so"), 0.06, small),
        Part("A layer of 70B", ("matrix", "solved and updated"), 0.06, layer),
        Part(
            "Whole runs",
            ("run", "read", "time", "over the least", "busy", "GPU memory"),
            0.24,
            whole_runs,
            (
                f"The least from /dev/shm is the inputs' way to the card at {to_card:.1f} GB/s; from disk the same "
                "reads and writes with nothing computed. Disk: what Linux counts of the device; reading: the program's "
                "reader; two lanes compute, so theirs is 200 % at most.",
            ),
        ),
    )


def rows_of(part: Part, day: Day, problems: list[str]) -> Iterator[tuple[str, ...]]:
    """Rows of a part; what comes when its time is up is named and left out."""
    blank = ("-",) * (len(part.heads) - 2)
    for name, work in part.rows(day):
        if day.left_s() < LEAST_S:
            yield name, *blank, LEFT_OUT
            continue
        try:
            yield name, *work()
        except (WrongResult, LoxError, RuntimeError, OSError, AssertionError) as problem:  # the others are worth having
            told = (str(problem).splitlines() or [type(problem).__name__])[0]
            problems.append(f"{part.title}, {name}: {told}")
            say(problems[-1])
            yield name, *blank, f"FAILED: {told[:80]}"


def leading(day: Day, smoke: bool) -> Table:
    """Each figure with its target, and whether it was met."""
    rows = tuple(figure.row() for figure in day.figures.values())
    notes = ("Smoke form, on a CPU: no figure here means anything.",) if smoke else ()
    return Table("Targets", ("figure", "target", "measured", "met"), rows, notes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it (default: %(default)s)")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="other test files than those of the GPU")
    parser.add_argument("--results", type=Path, help="also write a Markdown file, and JSON and tests.txt beside it")
    args = parser.parse_args(argv)
    if not args.smoke and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA GPU, expected one. Try the script with --smoke")
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no pair is left behind
    sizes = SMOKE if args.smoke else REAL
    if args.smoke:  # all matrices go on the card
        mock.patch("lox_stream.costs.kept", return_value=False).start()
    device = torch.device("cpu") if args.smoke else torch.device("cuda", 0)
    name = "the interpreter" if args.smoke else torch.cuda.get_device_name()
    day = Day(device, sizes, Clock(device, sizes.repeats), started + args.seconds)
    day.rates = bandwidths(day)
    log = args.results and args.results.with_name("tests.txt")
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
    files = tuple(args.tests or TESTS)
    whole = tuple(args.tests or (SMOKE_TESTS if args.smoke else TESTS))
    parts = parts_of(day, partial(tests, files=files, whole=whole, log=log), name)
    taken: dict[str, list[tuple[str, ...]]] = {}
    problems: list[str] = []

    def results() -> tuple[dict[str, Any], list[Table]]:
        rows = [row for part in taken.values() for row in part]
        tables = [
            Table(part.title, part.heads, tuple(taken[part.title]), part.notes) for part in parts if part.title in taken
        ]
        return {
            "gpu": name,
            "rates": day.rates,
            "wrong": problems,
            "targets": {key: asdict(figure) for key, figure in day.figures.items()},
            "tables": {title: [list(row) for row in part] for title, part in taken.items()},
            "left_out": [row[0] for row in rows if row[-1] == LEFT_OUT],
            "to_come": [part.title for part in parts if part.title not in taken],
        }, [leading(day, args.smoke), *tables]

    for number, part in enumerate(parts):
        now, shares = time.monotonic(), sum(later.share for later in parts[number:])
        day.until = now + max(0.0, started + args.seconds - RESERVE_S - now) * part.share / shares
        say(f"gpu_day: {part.title}, {day.left_s():.0f} s at most")
        taken[part.title] = []
        try:
            for row in rows_of(part, day, problems):
                taken[part.title].append(row)
        finally:  # also where this is ended from outside
            elapsed_s = time.monotonic() - started
            day.found("day", f"{elapsed_s:.0f} s", elapsed_s <= SECONDS)
            figures, tables = results()
            if args.results:
                save(args.results, record_of("gpu_day", figures), tables)
    finish("gpu_day", tables, figures, args.results)
    return 1 if problems or day.figures["tests"].met is False else 0


if __name__ == "__main__":
    sys.exit(main())
