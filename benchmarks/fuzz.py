#!/usr/bin/env python3
"""What lox-stream reads, damaged and made up: headers, indexes, configs, files of torch, journals, manifests, recipes.

    python benchmarks/fuzz.py                                   a million cases and more, some ten minutes on one core
    python benchmarks/fuzz.py --cases 20000                     the short form
    python benchmarks/fuzz.py --only header --case 123456       one case again, with its traceback

Each target is a process of its own, with 1 GiB of address space to grow by. The laws of every case: what is raised is a
LoxError whose text holds nothing that a terminal obeys; nothing outside the case's folder is opened, listed or changed,
and inside it nothing is written; it takes less than a second of CPU. A case is made of the seed and its number alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fuzz_targets
from harness import Table, finish, say

from lox_stream.errors import LoxError

LIMIT_S = 1.0  # of CPU, for one case
HANGS_S = 20  # of the clock: then a case is broken off
GROWTH_BYTES = 1 << 30
CASES = 1_050_000
SHOWN_FAILURES = 20
READING = ("open", "os.listdir", "os.scandir", "glob.glob")
CHANGING = (
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod", "os.chown"),
    *("os.utime", "os.setxattr", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "os.spawn"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "ctypes.dlopen", "code.__new__", "shutil.rmtree"),
)
PYTHON = tuple({os.path.realpath(path) + os.sep for path in (sys.prefix, sys.base_prefix)})


class Law(Exception):
    """A case broke a law; the text says which."""


@dataclass(slots=True)
class Outcome:
    """What the cases of one target came to."""

    target: str
    cases: int = 0
    refused: int = 0
    accepted: int = 0
    slowest_s: float = 0.0
    slowest_case: int = 0
    grown_bytes: int = 0  # peak of the process over what it held before
    elapsed_s: float = 0.0
    failed: int = 0
    failures: dict[str, int] = field(default_factory=dict)  # what went wrong: the first case of it

    def count(self, case: int, problem: str) -> None:
        self.failed += 1
        self.failures.setdefault(problem, case)


class Watch:
    """An audit hook, which Python has no way to take out again: it looks while a case runs, and at nothing else."""

    def __init__(self, folder: Path) -> None:
        self._inside = os.path.realpath(folder) + os.sep
        self.broken: list[str] = []
        self._active = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._active:
            return
        if event in CHANGING:
            self.broken.append(f"{event} {args!r:.200}")
        elif event in READING and not isinstance(args[0], int | None):
            path = os.path.realpath(os.fsdecode(args[0]))
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or not (path + os.sep).startswith((self._inside, *PYTHON)):
                self.broken.append(f"{event} {args!r:.200}")

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        self._active = True
        try:
            yield
        finally:
            self._active = False


def run_case(target: fuzz_targets.Target, watch: Watch) -> bool:
    """Read the case that was made: whether it was accepted. Raises Law, or what should not have been raised."""
    watch.broken.clear()
    accepted = True
    signal.alarm(HANGS_S)
    try:
        with watch.looking():
            said = target.read()
    except LoxError as error:
        accepted, said = False, str(error)
    finally:
        signal.alarm(0)
    if watch.broken:
        raise Law(f"outside its folder, or a change: {watch.broken[:3]}")
    if not said.replace("\n", "").isprintable():
        raise Law(f"its text holds what a terminal obeys: {said!r:.300}")
    return accepted


def fuzz(name: str, numbers: range, seed: int, folder: Path) -> Outcome:
    """All cases of one target, in a process of its own."""
    work = folder / name
    work.mkdir()
    target = fuzz_targets.TARGETS[name](work)
    watch = Watch(work)
    signal.signal(signal.SIGALRM, _hangs)
    fuzz_targets.warm_up(target)
    _limit_memory()
    outcome, before = Outcome(name), _peak_bytes()
    started = time.monotonic()
    for number in numbers:
        target.make(random.Random(f"{seed} {name} {number}"))
        began = time.process_time()
        try:
            accepted = run_case(target, watch)
            outcome.accepted += accepted
            outcome.refused += not accepted
        except Exception as error:
            outcome.count(number, _last_line(error))
        took = time.process_time() - began
        outcome.cases += 1
        if took > outcome.slowest_s:
            outcome.slowest_s, outcome.slowest_case = took, number
        if took > LIMIT_S:
            outcome.count(number, f"took over {LIMIT_S} s")
    outcome.elapsed_s, outcome.grown_bytes = time.monotonic() - started, _peak_bytes() - before
    return outcome


def _hangs(*_: object) -> None:
    raise Law(f"took over {HANGS_S} s")


def _limit_memory() -> None:
    """GROWTH_BYTES over what the process has mapped."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + GROWTH_BYTES, mapped + GROWTH_BYTES))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _last_line(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error!s:.100} ({Path(place.filename).name}:{place.lineno})"


def shares(total: int, only: str) -> dict[str, range]:
    """How many cases each target has: by its weight, which is about its speed."""
    weights = {name: target.weight for name, target in fuzz_targets.TARGETS.items() if only in ("", name)}
    whole = sum(weights.values())
    return {name: range(-(-total * weight // whole)) for name, weight in weights.items()}


def fuzz_all(cases: int, seed: int, only: str = "", jobs: int = 1) -> list[Outcome]:
    """Every target (or `only` one), `jobs` at a time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        context = get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
            running = [
                pool.submit(fuzz, name, numbers, seed, Path(folder)) for name, numbers in shares(cases, only).items()
            ]
            outcomes = []
            for one in running:
                outcomes.append(one.result())
                say(f"fuzz: {outcomes[-1].target}: {outcomes[-1].cases} cases, {outcomes[-1].failed} failures")
    return outcomes


def again(name: str, number: int, seed: int) -> int:
    """One case, its input on stdout and its traceback, if it has one, on stderr."""
    with tempfile.TemporaryDirectory() as folder:
        target = fuzz_targets.TARGETS[name](Path(folder))
        signal.signal(signal.SIGALRM, _hangs)
        target.make(random.Random(f"{seed} {name} {number}"))
        for path in target.made():
            print(path, path.read_bytes()[:4000] if path.is_file() else "")
        run_case(target, Watch(Path(folder)))
    return 0


def table_of(outcomes: list[Outcome], seed: int) -> Table:
    heads = (
        "target",
        "cases",
        "refused",
        "accepted",
        "broke a law",
        "slowest case",
        "memory grew by",
        "cases a second",
    )
    rows = tuple(
        (
            one.target,
            f"{one.cases:,}",
            f"{one.refused:,}",
            f"{one.accepted:,}",
            f"{one.failed:,}",
            f"{one.slowest_s * 1e3:.0f} ms",
            f"{one.grown_bytes / 1e6:.0f} MB",
            f"{one.cases / one.elapsed_s:,.0f}",
        )
        for one in outcomes
    )
    total = sum(one.cases for one in outcomes)
    failures = [
        f"    {one.target}, case {case}: {problem}"
        for one in outcomes
        for problem, case in [*one.failures.items()][:SHOWN_FAILURES]
    ]
    said = f"{total:,} cases, seed {seed}. {' '.join((fuzz_targets.WHAT).split())}"
    return Table("Fuzzing what is read", heads, rows, (said, *(["\n".join(failures)] if failures else [])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=CASES, help="of all targets together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--only", default="", choices=["", *fuzz_targets.TARGETS], metavar="TARGET", help="one target")
    parser.add_argument("--case", type=int, help="only this one, with --only")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="also write a Markdown file, and the JSON beside it")
    args = parser.parse_args()
    if args.case is not None:
        return again(args.only, args.case, args.seed)
    outcomes = fuzz_all(args.cases, args.seed, args.only, args.jobs)
    results = {"seed": args.seed, "targets": [asdict(one) for one in outcomes]}
    finish("fuzz", [table_of(outcomes, args.seed)], results, args.results)
    return int(any(one.failures for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
