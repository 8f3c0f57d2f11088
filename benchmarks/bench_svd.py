#!/usr/bin/env python3
"""Full against randomized SVD: every solver that one would pick, on planted and real differences of weights.

    python benchmarks/bench_svd.py                              the base case, and one factor varied at a time: an hour
    python benchmarks/bench_svd.py --only 'base*' --only 'spikes*'    some of the cases
    python benchmarks/bench_svd.py --real build/real/pair     also a matrix of each shape of the pair of make demo-real
    python benchmarks/bench_svd.py --full --work DIR            every spectrum, shape, dtype and rank: days; goes on
                                                                where it was stopped
    python benchmarks/bench_svd.py --smoke                      tiny matrices, one repetition

Results are judged by the float64 rank-k part, which is kept in --work. With --results FILE.md also FILE.json, FILE.csv
with every single result, and FILE.png and FILE.svg: time against the share of elements that differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from harness import Table, finish, machine, parsed, say
from torch import Tensor

from lox_stream.cases import choose, load
from lox_stream.charts import OURS, picture
from lox_stream.cli_bench import ALPHA, write_csv
from lox_stream.comparing import Case, LeftOut, Measured, compare, fastest, verdict
from lox_stream.contenders import CONTENDERS
from lox_stream.options import Options, thread_count
from lox_stream.planning import plan
from lox_stream.reference import Bands, Leading, leading
from lox_stream.synthetic import hash_of, pair_of, power_law
from lox_stream.workers import Workers

SHARES = (0.9995, 0.9999)
TARGET, FULL_TARGET = 2.0, 100.0  # times faster than the best other solver, and than the full SVD at 4096 x 4096
SHAPES = ((576, 576), (1536, 576), (2048, 5632), (4096, 4096), (4096, 14336), (32000, 4096))
BASE_SHAPE, BASE_RANK = (4096, 4096), 6
RANKS = (1, 6, 16, 64)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SPIKES, SPIKE_ENERGY, SPIKE_RATIO = 6, 0.45, 0.93  # SFT deltas: 0.27 to 0.64, and s_7/s_6 of 0.89 to 0.97
DRAWN = 6  # panels of the picture, at most


def noise(m: int, n: int) -> Tensor:
    """(min(m, n),) singular values of a matrix of noise, from those of one a tenth of its size; the largest is 1."""
    short, long = sorted((m, n))
    small = max(short // 10, min(short, 64))
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(torch.randn(small, max(small, long * small // short), generator=generator))
    places = torch.linspace(0, small - 1, short)
    low = places.long().clamp(max=small - 2)
    values = values[low] + (values[low + 1] - values[low]) * (places - low)
    return values / values[0]


def spikes(m: int, n: int, rank: int) -> Tensor:
    """Noise, and SPIKES values above it that hold SPIKE_ENERGY of the squares; s_7/s_6 = SPIKE_RATIO."""
    bulk = SPIKE_RATIO * noise(m, n)[: min(m, n) - SPIKES]
    wanted = float(bulk.square().sum()) * SPIKE_ENERGY / (1 - SPIKE_ENERGY)
    shape = torch.linspace(1, 0, SPIKES)

    def energy(top: float) -> float:
        return float((1 + (top - 1) * shape).square().sum())

    top = 1.0
    while energy(top) < wanted:
        top *= 1.01
    return torch.cat([1 + (top - 1) * shape, bulk])


def steps(count: int) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float32)


SPECTRA = {
    "power 0.55": lambda m, n, k: power_law(min(m, n), 0.55, k, None),
    "flat": lambda m, n, k: torch.ones(min(m, n)),
    "power 0.5": lambda m, n, k: power_law(min(m, n), 0.5, k, None),
    "power 1": lambda m, n, k: power_law(min(m, n), 1.0, k, None),
    "power 2": lambda m, n, k: power_law(min(m, n), 2.0, k, None),
    "exponential": lambda m, n, k: torch.exp(-steps(min(m, n)) / 20),
    "step": lambda m, n, k: torch.where(steps(min(m, n)) <= k, 1.0, 0.05),
    "ratio 0.9": lambda m, n, k: power_law(min(m, n), 0.55, k, 0.9),
    "ratio 0.97": lambda m, n, k: power_law(min(m, n), 0.55, k, 0.97),
    "ratio 0.998": lambda m, n, k: power_law(min(m, n), 0.55, k, 0.998),
    "spikes": spikes,
}


@dataclass(frozen=True, slots=True)
class Planted:
    """A pair to be made."""

    spectrum: str
    shape: tuple[int, int]
    dtype: str
    rank: int

    @property
    def name(self) -> str:
        base = "base: " if self == BASE else ""
        return f"{base}{self.spectrum}, {self.shape[0]} x {self.shape[1]} {self.dtype}, rank {self.rank}"

    def make(self) -> tuple[Tensor, Tensor]:
        """(W1, W0)."""
        generator = torch.Generator().manual_seed(hash_of(0, self.name))
        spectrum = SPECTRA[self.spectrum](*self.shape, self.rank)
        w0, w1 = pair_of(*self.shape, generator, dtype=DTYPES[self.dtype], spectrum=spectrum)
        return w1, w0


BASE = Planted("power 0.55", BASE_SHAPE, "bf16", BASE_RANK)


def one_at_a_time() -> list[Planted]:
    """The base case, one factor varied at a time, and what training leaves at every shape."""
    shape, rank = BASE_SHAPE, BASE_RANK
    cases = [BASE, *(Planted("spikes", some, "bf16", rank) for some in SHAPES)]
    cases += [Planted(name, shape, "bf16", rank) for name in SPECTRA]
    cases += [Planted("power 0.55", some, "bf16", rank) for some in SHAPES]
    cases += [Planted("power 0.55", shape, dtype, rank) for dtype in DTYPES]
    cases += [Planted("power 0.55", shape, "bf16", some) for some in RANKS]
    return list(dict.fromkeys(cases))


def crossed() -> list[Planted]:
    return [Planted(*some) for some in itertools.product(SPECTRA, SHAPES, DTYPES, RANKS)]


def smoke() -> list[Planted]:
    return [Planted("power 1", (96, 64), "bf16", 2), Planted("spikes", (80, 96), "fp16", 6)]


@dataclass(frozen=True, slots=True)
class Setup:
    """How a case is measured, and where what was found is kept."""

    work: Path
    workers: Workers
    repeats: int
    limit_s: float
    commit: str


def results_of(setup: Setup, name: str, rank: int, weights: tuple[Tensor, Tensor]) -> list[Measured | LeftOut]:
    """Measured now, or earlier by the same commit in the same work folder."""
    key = f"{hash_of(rank, name):016x}"
    kept = setup.work / f"{key}-{setup.commit}-{setup.repeats}.json"
    if kept.exists():
        say(f"{name}: found in {kept}")
        return [(Measured if "knob" in row else LeftOut)(**row) for row in json.loads(kept.read_text())]
    delta = Bands(*weights)
    exact = _oracle(setup.work / f"{key}.pt", name, delta, rank)
    results = list(
        compare(
            Case(name, delta, rank, exact),
            list(CONTENDERS.values()),
            setup.workers,
            alpha=ALPHA,
            repeats=setup.repeats,
            limit_s=setup.limit_s,
            say=say,
        )
    )
    if not setup.commit.endswith("+"):
        kept.write_text(json.dumps([asdict(row) for row in results]))
    return results


def _oracle(file: Path, name: str, delta: Bands, rank: int) -> Leading:
    if file.exists():
        return Leading(*torch.load(file, weights_only=True))
    say(f"{name}: the exact result, in float64")
    found = leading(delta, rank)
    torch.save((found.u, found.s, found.vh), file)
    return found


def everything(args: argparse.Namespace, setup: Setup) -> Iterator[Measured | LeftOut]:
    wanted = smoke() if args.smoke else crossed() if args.full else one_at_a_time()
    for planted in wanted:
        if _asked(planted.name, args.only):
            yield from results_of(setup, planted.name, planted.rank, planted.make())
    if args.real is not None:
        made = plan(args.real / "base", args.real / "aligned")
        for choice in choose(made, (), 1, 0):
            name = f"real: {choice.name}"
            if _asked(name, args.only) and min(choice.step.m, choice.step.n) > BASE_RANK:
                yield from results_of(setup, name, BASE_RANK, load(choice))


def _asked(name: str, globs: Sequence[str]) -> bool:
    return not globs or any(fnmatchcase(name, glob) for glob in globs)


def table(rows: Sequence[Measured], share: float) -> Table:
    """For each case ours, the best other, and the full SVD; nobody who misses the share has a time."""
    lines, ratios = [], []
    for name in dict.fromkeys(row.case for row in rows):
        some = [row for row in rows if row.case == name]
        best = fastest(some, share)
        mine, full = best.pop(OURS, None), best.get("full")
        other = min(best.values(), key=lambda row: row.elapsed_s, default=None)
        if other is not None and mine is not None:
            ratios.append(other.elapsed_s / mine.elapsed_s)
        lines.append(
            (
                name,
                f"{1 - some[0].gap:.4f}",
                _time(mine),
                "misses" if other is None else f"{other.solver} {other.knob} {other.value:g}",
                _time(other),
                _ratio(other, mine),
                _ratio(full, mine),
                "-" if mine is None else f"{mine.differing:.1e}",
                "-" if mine is None or mine.predicted is None else f"{mine.predicted:.1e}",
            )
        )
    heads = ("case", "s_k+1 / s_k", "ours", "best other", "its time", "ours is faster", "full SVD: ours is faster",
             "differ", "predicted")  # fmt: skip
    good = sum(ratio >= TARGET for ratio in ratios)
    notes = (
        f"Target: {TARGET:g}x faster than the best other solver where ours iterates; held in {good} of {len(ratios)} "
        f"cases. Full SVD at 4096 x 4096: {FULL_TARGET:g}x.",
    )
    return Table(f"{100 * share:g} % of the output's elements bit-identical", heads, tuple(lines), notes)


def _time(row: Measured | None) -> str:
    return "misses" if row is None else f"{row.elapsed_s * 1e3:.3g} ms"


def _ratio(other: Measured | None, mine: Measured | None) -> str:
    return "-" if other is None or mine is None else f"{other.elapsed_s / mine.elapsed_s:.2f}x"


def prediction(rows: Sequence[Measured]) -> Table:
    """How well ours foretold the share of differing elements, over all of its results that reach 99 %."""
    ours = [row for row in rows if row.solver == OURS and row.predicted and 1e-5 < row.differing < 0.01]
    ratios = sorted(row.predicted / row.differing for row in ours if row.predicted)
    marks = (0.0, 0.1, 0.5, 0.9, 1.0)
    cells = tuple(f"{ratios[math.floor(mark * (len(ratios) - 1))]:.2f}" for mark in marks) if ratios else ("-",) * 5
    heads = ("predicted / counted share", "least", "10 %", "median", "90 %", "most")
    return Table("How well the share was foretold", heads, ((f"{len(ratios)} results", *cells),))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="only cases with such names")
    parser.add_argument("--real", type=Path, metavar="DIR", help="folder with base and aligned")
    parser.add_argument("--full", action="store_true", help="the whole cross product")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep oracles and results here")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a solve may take (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny matrices, one repetition")
    return parsed(parser, argv, 5)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as scratch, Workers(thread_count(Options())) as workers:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        if args.results is not None:
            args.results.parent.mkdir(parents=True, exist_ok=True)  # now, and not after an hour
        setup = Setup(work, workers, 1 if args.smoke else args.repeat, args.limit, machine()["commit"])
        results = list(everything(args, setup))
    rows = [row for row in results if isinstance(row, Measured)]
    if not rows:
        say("no case has such a name")
        return 2
    if args.results is not None:
        write_csv(args.results.with_suffix(".csv"), rows)
        drawn = list(dict.fromkeys(row.case for row in rows))[:DRAWN]
        for suffix in (".png", ".svg"):
            picture([row for row in rows if row.case in drawn], SHARES, args.results.with_suffix(suffix))
    finish(
        "bench_svd",
        [*(table(rows, share) for share in SHARES), prediction(rows)],
        {
            "repeat": setup.repeats,
            "alpha": ALPHA,
            "verdicts": {
                f"{share:g}": {name: verdict([row for row in rows if row.case == name], share)
                               for name in dict.fromkeys(row.case for row in rows)}
                for share in SHARES
            },
            "left_out": [asdict(row) for row in results if isinstance(row, LeftOut)],
        },
        args.results,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
