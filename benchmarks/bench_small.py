#!/usr/bin/env python3
"""Small matrices as a run meets them: many of one shape, side by side on all cores.

    python benchmarks/bench_small.py                            planted differences, some minutes
    python benchmarks/bench_small.py --real build/real/pair     also those of the pair of make demo-real
    python benchmarks/bench_small.py --smoke                    tiny, one repetition

Alone, a small matrix of ours takes one core while torch's solvers take all (bench_svd.py shows that). A model has many,
and what counts is how long all take. So every solver has the same here: jobs on as many threads as cores, torch and the
other packages at one thread in each. A job is a matrix; ours takes as many as `costs.together` says. Every solver is at
the cheapest value of its knob that has the share asked for, on average over the first matrices, which are judged by
LAPACK in float64. What ours solves by the Gram matrix (`costs.by_gram`) is called so, and stands beside the same in
float64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from bench_svd import SPECTRA
from harness import Table, Timing, alternate, finish, parsed, say
from torch import Tensor

from lox_stream.cases import choose, load
from lox_stream.charts import OURS
from lox_stream.cli_bench import ALPHA
from lox_stream.comparing import Judge
from lox_stream.contenders import CONTENDERS, Contender, Problem, ours_together
from lox_stream.costs import by_gram, kept, together
from lox_stream.options import Options, thread_count
from lox_stream.planning import plan
from lox_stream.reference import Bands, leading
from lox_stream.synthetic import hash_of, pair_of
from lox_stream.workers import Workers

RANK, SHARE = 6, 0.9995
WIDE_GRAM = "gram-eigh in float64"
SHAPES = ((64, 576), (96, 2048), (128, 2048), (192, 576), (576, 576), (1536, 576))
LAWS = ("power 0.55", "spikes")
JUDGED = 4  # matrices that decide on a knob
COARSEST_S = 1.0  # a matrix; a solver that takes longer goes no further


@dataclass(frozen=True, slots=True)
class Case:
    """Matrices of one shape."""

    name: str
    pairs: Sequence[tuple[Tensor, Tensor]]  # (W1, W0)


def planted(shapes: Sequence[tuple[int, int]], count: int) -> Iterator[Case]:
    for law in LAWS:
        for m, n in shapes:
            spectrum = SPECTRA[law](m, n, RANK)
            generators = [torch.Generator().manual_seed(hash_of(seed, f"{law} {m} {n}")) for seed in range(count)]
            pairs = [pair_of(m, n, generator, dtype=torch.bfloat16, spectrum=spectrum) for generator in generators]
            yield Case(f"{law}, {m} x {n}", [(w1, w0) for w0, w1 in pairs])


def real(folder: Path, count: int) -> Iterator[Case]:
    choices = choose(plan(folder / "base", folder / "aligned"), (), count, 0)
    for m, n in dict.fromkeys((choice.step.m, choice.step.n) for choice in choices):
        if min(m, n) > RANK and kept(m, n):
            same = [choice for choice in choices if (choice.step.m, choice.step.n) == (m, n)]
            yield Case(f"real, {m} x {n}", [load(choice) for choice in same])


def jobs_of(contender: Contender, value: float, problems: Sequence[Problem]) -> list[Callable[[], object]]:
    if contender.name != OURS:
        return [partial(contender.solve, problem, value) for problem in problems]
    size = together(*problems[0].w1.shape, RANK, "randomized", Options().memory_bytes)
    groups = [problems[first : first + size] for first in range(0, len(problems), size)]
    return [partial(ours_together, group, value) for group in groups]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A solver at the cheapest value of its knob that has SHARE of the elements right."""

    contender: Contender
    value: float
    method: str  # that it picked
    differing: float


def cheapest(
    contender: Contender, problems: Sequence[Problem], judges: Sequence[Judge], workers: Workers
) -> Chosen | None:
    for value in contender.sweep(torch.bfloat16):
        started = time.perf_counter()
        found = [workers.call(partial(contender.solve, one, value)) for one in problems[: len(judges)]]
        shares = [judge.measure(one)["differing"] for judge, one in zip(judges, found, strict=True)]
        if statistics.fmean(shares) <= 1 - SHARE:
            return Chosen(contender, value, found[0].method, statistics.fmean(shares))
        if time.perf_counter() - started > COARSEST_S * len(judges):
            return None
    return None


def measured(case: Case, workers: Workers, repeats: int) -> tuple[list[Chosen], dict[str, Timing]]:
    """Solvers that have SHARE, and their times for all matrices of the case, taken in turns."""
    problems = [Problem(w1, w0, RANK, ALPHA, seed, workers.run) for seed, (w1, w0) in enumerate(case.pairs)]
    bands = [Bands(w1, w0) for w1, w0 in case.pairs[:JUDGED]]
    judges = [Judge(delta, leading(delta, RANK), RANK, ALPHA) for delta in bands]
    say(case.name)
    there, works = [], {}
    contenders = [one for one in CONTENDERS.values() if one.installed]
    if by_gram(*problems[0].w1.shape):
        contenders.append(replace(CONTENDERS["gram-eigh"], name=WIDE_GRAM, values=(64,)))
    for contender in contenders:
        try:
            chosen = cheapest(contender, problems, judges, workers)
            if chosen is not None:
                work = partial(workers.call_all, jobs_of(contender, chosen.value, problems))
                work()
                works[contender.name] = work
                there.append(chosen)
        except (RuntimeError, ArithmeticError, ValueError) as failure:  # LAPACK's and ARPACK's among them
            say(f"{case.name}: {contender.name} fails: {str(failure).splitlines()[0]}")
    return there, alternate(repeats, works, warm_up=False)


def line(case: Case, there: Sequence[Chosen], timings: dict[str, Timing]) -> tuple[str, ...]:
    per_matrix = {name: timing.median / len(case.pairs) for name, timing in timings.items()}
    order = sorted((name for name in per_matrix if name != OURS), key=lambda name: per_matrix[name])
    cells = [f"{name} {per_matrix[name] * 1e3:.2f} ms" for name in order[:2]]
    wide = f"{per_matrix[WIDE_GRAM] * 1e3:.2f} ms" if WIDE_GRAM in per_matrix else "-"
    mine = next((one for one in there if one.contender.name == OURS), None)
    if mine is None:
        return (case.name, "misses", "-", *cells, wide, "-", "-")
    best = f"{per_matrix[order[0]] / per_matrix[OURS]:.2f}x" if order else "-"
    return (case.name, f"{per_matrix[OURS] * 1e3:.2f} ms", mine.method, *cells, wide, best, f"{mine.differing:.1e}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, metavar="DIR", help="folder with base and aligned")
    parser.add_argument("--count", type=int, default=32, help="matrices of a shape (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny matrices, one repetition")
    args = parsed(parser, argv, 5)
    shapes, count, repeats = (((40, 60), (110, 120)), 5, 1) if args.smoke else (SHAPES, args.count, args.repeat)
    cases = [*planted(shapes, count), *(real(args.real, count) if args.real else ())]
    lines, records = [], []
    with Workers(thread_count(Options())) as workers, one_thread_for_blas():
        for case in cases:
            there, timings = measured(case, workers, repeats)
            lines.append(line(case, there, timings))
            records.append(
                {
                    "case": case.name,
                    "matrices": len(case.pairs),
                    "solvers": {
                        one.contender.name: {
                            "knob": one.contender.knob,
                            "value": one.value,
                            "method": one.method,
                            "differing": one.differing,
                            "all": timings[one.contender.name].record(),
                        }
                        for one in there
                    },
                }
            )
    heads = ("case", "ours, a matrix", "method", "best other", "next", WIDE_GRAM, "ours is faster", "differ")
    title = f"{100 * SHARE:g} % of the output's elements bit-identical, {count} matrices side by side"
    finish("bench_small", [Table(title, heads, tuple(lines))], {"share": SHARE, "cases": records}, args.results)
    return 0


def one_thread_for_blas() -> AbstractContextManager[object]:
    """For NumPy's and SciPy's BLAS, which do not heed torch's setting."""
    if find_spec("threadpoolctl") is None:
        return nullcontext()
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


if __name__ == "__main__":
    sys.exit(main())
