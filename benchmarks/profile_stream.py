#!/usr/bin/env python3
"""Where the time of a computation goes: on one thread, inputs warm, output discarded, by stage.

    python benchmarks/profile_stream.py --only 135m           under a minute once the pair is made
    python benchmarks/profile_stream.py --smoke               that it works

Seconds are a stage's own, without the stages inside it. "Arithmetic" is what no other program for the same method would
save: products, updates, forming differences, Gram matrices, eigenvalues, and the first touch of mapped pages.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import pairs
import torch
from bench_stream import ALPHA, RANK, Discard
from harness import ROOT, Table, Timing, finish, parsed

from lox_stream import Options, bases, delta, krylov, plan, processing, svd, update
from lox_stream.pipeline import compute

# stage, whether it is arithmetic, and the functions that make it
STAGES: tuple[tuple[str, bool, tuple[tuple[Any, str], ...]], ...] = (
    ("products, delta kept", True, ((delta.KeptDelta, "matmul"), (delta.KeptDelta, "rmatmul"))),
    ("products, delta streamed", True, ((delta.Delta, "matmul"), (delta.Delta, "rmatmul"), (delta.Delta, "normal"))),
    ("forming kept differences", True, ((delta.KeptDelta, "_form"),)),
    ("update and retention", True, ((update, "lowrank_update"),)),
    ("sample: first touch of the pages", True, ((update, "Sample"),)),
    ("Gram matrices", True, ((krylov.Space, "append"),)),
    ("eigenvalues", True, ((torch.linalg, "eigh"),)),
    ("projections", True, ((bases, "off"),)),
    ("normalising", False, ((bases, "normalising"), (krylov, "orthonormal"))),
    ("looks and half steps", False, ((krylov.Space, "look"), (krylov.Space, "_half_step"))),
    ("rest of the solver", False, ((svd, "iterate"), (update, "truncated_svds"))),
    ("tiles out, facts", False, ((update, "emit_tiles"), (update, "facts_of"))),
    ("maps opened and given back, all else", False, ((processing, "_extrapolate"), (processing, "copy_from"))),
)


class Clock:
    """Own time of nested calls, on one thread."""

    def __init__(self) -> None:
        self.own_s = {stage: 0.0 for stage, _, _ in STAGES}
        self._inner_s: list[float] = []

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function, updated=())
        def timed(*args: Any, **options: Any) -> Any:
            self._inner_s.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                elapsed_s = time.perf_counter() - started
                self.own_s[stage] += elapsed_s - self._inner_s.pop()
                if self._inner_s:
                    self._inner_s[-1] += elapsed_s

        return timed


def profile(pair: pairs.Pair, repeats: int) -> tuple[dict[str, Timing], Timing]:
    """Each stage's own seconds, and the whole; the first repetition warms up and does not count."""
    made = plan(pair.base, pair.aligned, options=Options(rank=RANK, alpha=ALPHA, threads=1))
    stages, whole = {stage: Timing() for stage, _, _ in STAGES}, Timing()
    for turn in range(repeats + 1):
        clock, total = Clock(), Timing()
        pairs.warm(pair.files)
        with ExitStack() as patches:
            for stage, _, functions in STAGES:
                for place, name in functions:
                    patches.enter_context(mock.patch.object(place, name, clock.timed(stage, getattr(place, name))))
            total.take(lambda: [None for _ in compute(made.steps, Discard, made.options)])
        if turn:
            whole.add(total.median, total.cpu_s[0])
            for stage, seconds in clock.own_s.items():
                stages[stage].add(seconds, seconds)
    return stages, whole


def table(name: str, stages: dict[str, Timing], whole: Timing) -> Table:
    arithmetic = {stage for stage, counts, _ in STAGES if counts}
    rows = [(stage, "yes" if stage in arithmetic else "", f"{t.median:.3f} s", f"{t.median / whole.median:.0%}")
            for stage, t in stages.items()]  # fmt: skip
    known = sum(t.median for t in stages.values())
    rows.append(("outside of these", "", f"{whole.median - known:.3f} s", f"{1 - known / whole.median:.0%}"))
    sure = sum(t.median for stage, t in stages.items() if stage in arithmetic)
    rows.append(("all of the arithmetic", "", f"{sure:.2f} s", f"{sure / whole.median:.0%}"))
    rows.append(("all", "", f"{whole.median:.2f} s", "100%"))
    return Table(f"{name}, one thread", ("stage", "arithmetic", "seconds", "share"), tuple(rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="135m", choices=list(pairs.MODELS), help="the pair (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="one repetition on a tiny pair")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "bench", help="folder of the pairs; they are kept"
    )
    args = parsed(parser, argv, 3)
    model = pairs.SMOKE if args.smoke else pairs.MODELS[args.only]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) if args.smoke else args.work
        work.mkdir(parents=True, exist_ok=True)
        stages, whole = profile(pairs.make(model, work), 1 if args.smoke else args.repeat)
    figures = {"seconds": {stage: t.record() for stage, t in stages.items()}, "whole": whole.record()}
    finish("profile_stream", [table(model.name, stages, whole)], {"pair": model.name, **figures}, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
