#!/usr/bin/env python3
"""Runs that are killed, lose their power, meet errors of the system, inputs that change, and too little disk or memory.

    python benchmarks/torture.py --minutes 30                     the long form
    python benchmarks/torture.py --minutes 3                      the short form, of CI
    python benchmarks/torture.py --only power --case 1234         one case again

A case is made of the seed, its part and its number alone, and every failure names them (what threads do in between
is the machine's affair: a kill at a time of the clock may need some tries). Exit code 1 where a law was broken.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from harness import Table, cores, finish, say
from torture_faults import Faults
from torture_full import Full
from torture_inputs import Inputs
from torture_kills import Kills
from torture_memory import Cgroup, Memory
from torture_power import Power
from torture_promises import PROMISES, rewrite
from torture_world import SHAPES, Law, Outcome, World, fork, require_inputs_untouched

MOST_FAILURES = 10  # of one part, then it ends


class Part(Protocol):
    """One way to torture a run. `case` raises Law; `cases` is how many there are, None for any number."""

    part: str
    cases: int | None

    def case(self, number: int, folder: Path, outcome: Outcome) -> None: ...


PARTS: dict[str, tuple[Callable[[list[World], Path, int], Part], float]] = {  # made by, share of the time
    "kills": (Kills, 0.2),
    "power": (Power, 0.2),
    "inputs": (Inputs, 0.08),
    "full": (Full, 0.04),
    "memory": (Memory, 0.04),
    "cgroup": (Cgroup, 0.04),
    "faults": (Faults, 0.4),
}


def tortured(part: Part, folder: Path, job: int, jobs: int, until_s: float) -> Outcome:
    """Every `jobs`-th case from `job` on, until the time is over or there are no more."""
    outcome, number, started = Outcome(part.part), job, time.monotonic()
    while time.monotonic() < until_s and (part.cases is None or number < part.cases):
        problem = _problem(part, number, folder, outcome)
        if problem:
            outcome.failures[f"--only {part.part} --case {number}"] = problem
            say(f"torture: {part.part} {number}: {problem[:300]}")
        outcome.cases += 1
        number += jobs
        if len(outcome.failures) >= MOST_FAILURES:
            break
    outcome.elapsed_s = time.monotonic() - started
    return outcome


def _problem(part: Part, number: int, folder: Path, outcome: Outcome) -> str:
    try:
        part.case(number, folder, outcome)
    except Law as error:
        return str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    return ""


def torture(name: str, worlds: list[World], folder: Path, seed: int, jobs: int, seconds: float) -> Outcome:
    """One part, by several processes."""
    started = time.monotonic()
    part = PARTS[name][0](worlds, folder, seed)
    pids = {}
    for job in range(jobs):
        own = folder / f"{name}-{job}"
        own.mkdir()

        def work(job: int = job, own: Path = own) -> int:
            outcome = tortured(part, own, job, jobs, started + seconds)
            (own / "outcome.pickle").write_bytes(pickle.dumps(outcome))
            return 0

        pids[fork(work)] = own
    whole = Outcome(name, of=part.cases, skipped=[*getattr(part, "skipped", [])])
    for pid, own in pids.items():
        _, status = os.waitpid(pid, 0)
        result = own / "outcome.pickle"
        if result.exists():
            whole.add(pickle.loads(result.read_bytes()))
        else:
            whole.failures[f"--only {name}"] = f"a process of the harness ended with status {status}"
        shutil.rmtree(own, ignore_errors=True)
    try:
        for world in worlds:
            require_inputs_untouched(world)
    except Law as error:
        whole.failures[f"--only {name}"] = str(error)
    whole.elapsed_s = time.monotonic() - started
    say(f"torture: {name}: {whole.cases} cases, {len(whole.failures)} failures, {whole.elapsed_s:.0f} s")
    return whole


def _fits(made_by: Any, args: argparse.Namespace) -> bool:
    """Whether a part is worth its time; one that was asked for is."""
    return bool(args.only) or args.minutes >= getattr(made_by, "least_minutes", 0)


def tables_of(outcomes: list[Outcome], seed: int) -> list[Table]:
    rows = tuple(
        (
            PROMISES[one.part][0],
            f"{one.cases:,}" + (f" of {one.of:,}" if one.of else ""),
            f"{len(one.failures):,}",
            f"{one.elapsed_s:,.0f} s",
        )
        for one in outcomes
    )
    notes = [f"    {case}: {problem[:500]}" for one in outcomes for case, problem in one.failures.items()]
    skipped = [f"{one.part}: {reason}" for one in outcomes for reason in one.skipped]
    first = Table("Torture", ("promise", "cases", "broke it", "time"), rows, (f"Seed {seed}.", *notes, *skipped))
    details = [
        Table(
            f"Of the part {one.part}",
            ("what", "count"),
            tuple((what, f"{n:,}") for what, n in sorted(one.counts.items())),
        )
        for one in outcomes
    ]
    return [first, *details]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="for all parts together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--only", default="", choices=["", *PARTS], metavar="PART", help=f"one of {', '.join(PARTS)}")
    parser.add_argument("--case", type=int, help="only this one, with --only")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes at a time (default: the cores)")
    parser.add_argument("--folder", type=Path, help="where (default: /dev/shm, else that of temporary files)")
    parser.add_argument("--results", type=Path, help="also write a Markdown file, and the JSON beside it")
    parser.add_argument("--docs", type=Path, help="also put the table of promises into this page, from --results")
    args = parser.parse_args(argv)
    if args.docs is not None and (args.results is None or args.results.stem != "reliability"):
        parser.error("--docs needs --results .../reliability.md, which it is written from")
    if not Path("/proc/self/fd").is_dir():
        parser.error("needs /proc, as Linux has it")
    memory = Path("/dev/shm")
    where = args.folder or (memory if memory.is_dir() else None)
    with tempfile.TemporaryDirectory(dir=where, prefix="lox-torture-") as name:
        folder = Path(name)
        worlds = []
        for number, shape in enumerate(SHAPES):
            (folder / f"world-{number}").mkdir()
            worlds.append(World(folder / f"world-{number}", shape))
        if args.case is not None:
            outcome = Outcome(args.only)
            PARTS[args.only][0](worlds, folder, args.seed).case(args.case, folder, outcome)
            print(outcome.counts)
            return 0
        chosen = [name for name, (made_by, *_) in PARTS.items() if args.only in ("", name) and _fits(made_by, args)]
        whole = sum(PARTS[name][1] for name in chosen)
        outcomes = [
            torture(name, worlds, folder, args.seed, args.jobs, 60 * args.minutes * PARTS[name][1] / whole)
            for name in chosen
        ]
    results: dict[str, Any] = {"seed": args.seed, "parts": [asdict(one) for one in outcomes]}
    finish("torture", tables_of(outcomes, args.seed), results, args.results)
    if args.docs is not None:
        rewrite(args.docs, args.results.parent)
    return int(any(one.failures for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
