#!/usr/bin/env python3
"""Speed and memory of a whole run, against the naive way and against the disk.

    python benchmarks/bench_stream.py                        all three pairs, about half an hour once they are made
    python benchmarks/bench_stream.py --only 135m            some minutes
    python benchmarks/bench_stream.py --smoke                seconds: that everything works, no figures

Alone: the computation in process, inputs in the page cache, output discarded; against `naive.py`, measured for each
shape of a matrix on torch's default threads, times how often the shape occurs.
End to end: `lox-stream run` as a program of its own, cold inputs, fresh output; against the larger of the IO floor
(`disk.floor`) and the computation alone, start-up taken off.
Memory: the largest RssAnon of that program, with the default budget and with 512 MB.

All of them take turns in one run (ABAB); medians. One tensor of each pair is compared with the float64 oracle before
any time is printed; a wrong one has no speed, and the exit code is 1. Needs Linux.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import disk
import pairs
import torch
from harness import ROOT, Table, Timing, WrongResult, busy_s, cores, finish, others_share, parsed, say
from naive import naive
from oracle import Weights, agreement, same_bits
from torch import Tensor

from lox_stream import Options, plan
from lox_stream.matching import Step
from lox_stream.pipeline import Finished, compute

RANK, ALPHA = 6, 1.25
LAW = 0.9995  # share of elements identical to the oracle, as in docs/accuracy.md
END_TO_END_TARGET = 1.15
SMALL_MEMORY = "512M"
MARGIN_BYTES = 400 << 20  # of RssAnon over the budget
BUSY = 0.1  # share of the cores taken by other work from which nothing here is worth publishing
BUDGETS = {"4GiB": 4 << 30, SMALL_MEMORY: 512_000_000}
CHECKED = 1e10  # m * n * min(m, n) of a matrix whose float64 SVD takes seconds


class Discard:
    """A target that keeps nothing, or the bytes of one tensor."""

    def __init__(self, step: Step, keep: bool = False) -> None:
        self.kept = bytearray(step.aligned.n_bytes) if keep else None

    def write(self, offset: int, data: memoryview) -> None:
        if self.kept is not None:
            self.kept[offset : offset + data.nbytes] = data.cast("B")

    def checksum(self) -> str:
        return ""


@dataclass(slots=True)
class Measured:
    """What was found out about one pair."""

    pair: pairs.Pair
    alone: Timing = field(default_factory=Timing)
    naive: dict[tuple[int, int], Timing] = field(default_factory=dict)
    floor: Timing = field(default_factory=Timing)
    run: Timing = field(default_factory=Timing)
    startup: Timing = field(default_factory=Timing)  # a run with next to nothing to do
    peaks: dict[str, int] = field(default_factory=dict)  # by budget
    work: list[float] = field(default_factory=list)  # seconds that all cores were busy in a run, start-up taken off
    cold: list[float] = field(default_factory=list)  # share of the inputs that came from the disk
    others: list[float] = field(default_factory=list)  # share of the cores that other work took, before each turn
    agreed: float = 0.0

    @property
    def naive_s(self) -> float:
        return sum(count * self.naive[shape].median for shape, count in self.pair.model.matrices.items())

    @property
    def faster(self) -> float:
        return self.naive_s / self.alone.median

    @property
    def over(self) -> float:
        """End to end without start-up, as a multiple of what nobody can beat: median over median."""
        return (self.run.median - self.startup.median) / max(self.floor.median, self.alone.median)

    @property
    def over_if_no_core_idled(self) -> float:
        """The same if the work that the cores did in a run, the kernel's included, were spread over all of them."""
        return statistics.median(self.work) / cores() / max(self.floor.median, self.alone.median)

    @property
    def over_in_turn(self) -> float:
        """The same within each repetition, then the median: a disk's luck changes from minute to minute."""
        columns = (self.run.samples, self.startup.samples, self.floor.samples, self.alone.samples)
        rows = zip(*columns, strict=True)
        return statistics.median((run - startup) / max(floor, alone) for run, startup, floor, alone in rows)


def alone(pair: pairs.Pair, timing: Timing, keep: str | None = None) -> bytes:
    """Time the computation with the output discarded; returns the bytes of the tensor called `keep`."""
    made = plan(pair.base, pair.aligned, options=Options(rank=RANK, alpha=ALPHA))
    kept = [b""]

    def work() -> None:
        for event in compute(made.steps, lambda step: Discard(step, step.name == keep), made.options):
            if isinstance(event, Finished) and event.step.name == keep:
                assert isinstance(event.target, Discard), "the only target made here"
                kept[0] = bytes(event.target.kept or b"")

    pairs.warm(pair.files)  # the program gives pages back as it goes
    timing.take(work)
    return kept[0]


def run(pair: pairs.Pair, out: Path, *options: str) -> disk.Ran:
    """`lox-stream run` as somebody types it."""
    paths = ["--base", str(pair.base), "--aligned", str(pair.aligned), "--out", str(out)]
    factors = ["--rank", str(RANK), "--alpha", str(ALPHA), "--quiet", *options]
    ran = disk.watched([sys.executable, "-P", "-m", "lox_stream", "run", *paths, *factors])
    if ran.code:
        raise WrongResult(f"{pair.model.name}: lox-stream run ended with {ran.code}")
    return ran


@contextmanager
def fresh(work: Path) -> Iterator[Path]:
    """A path for an output that does not exist yet; what is there later is removed."""
    folder = Path(tempfile.mkdtemp(prefix="out-", dir=work))
    try:
        yield folder / "out"
    finally:
        shutil.rmtree(folder)


def measure(pair: pairs.Pair, tiny: pairs.Pair, work: Path, repeats: int) -> Measured:
    """Everything about one pair, in turns. Raises WrongResult."""
    result = Measured(pair)
    name = checked_tensor(pair.model)
    right = check(pair, name, result)
    weights = {shape: both(pair, pair.model.first(shape)) for shape in pair.model.matrices}
    result.naive = {shape: Timing() for shape in weights}
    naive(*min(weights.values(), key=lambda pair: pair[0].numel()), RANK, ALPHA)  # torch starts its threads
    for turn in range(repeats):
        say(f"{pair.model.name}: repetition {turn + 1} of {repeats}")
        result.others.append(others_share())
        alone(pair, result.alone)
        for (m, n), (w1, w0) in weights.items():
            if turn == 0 or m * n * min(m, n) < pairs.HUGE:
                result.naive[m, n].take(lambda w1=w1, w0=w0: naive(w1, w0, RANK, ALPHA))  # type: ignore[misc]
        startup_s = around(pair, tiny, work, result)
        with fresh(work) as out:
            result.work.append(one_run(pair, out, result) - startup_s)
            compare(pair, out, name, right)
    with fresh(work) as out:
        result.peaks[SMALL_MEMORY] = run(pair, out, "--memory", SMALL_MEMORY).peak_anon_bytes
        compare(pair, out, name, right)
    return result


def around(pair: pairs.Pair, tiny: pairs.Pair, work: Path, result: Measured) -> float:
    """What a run is held against: the floor from cold, and start-up; returns how long that kept the cores busy."""
    with fresh(work) as out:
        pairs.cool(pair.files)
        result.floor.take(lambda: result.cold.append(disk.floor(pair.sides, out) / pair.input_bytes))
    with fresh(work) as out:
        before_s = busy_s()
        ran = run(tiny, out)
        result.startup.add(ran.elapsed_s, ran.cpu_s)
        return busy_s() - before_s


def one_run(pair: pairs.Pair, out: Path, result: Measured) -> float:
    """`lox-stream run` from cold; returns how long it kept the cores busy."""
    pairs.cool(pair.files)
    before_s = busy_s()
    ran = run(pair, out)
    worked_s = busy_s() - before_s
    result.run.add(ran.elapsed_s, ran.cpu_s)
    result.cold.append(ran.read_bytes / pair.input_bytes)
    result.peaks["4GiB"] = max(result.peaks.get("4GiB", 0), ran.peak_anon_bytes)
    return worked_s


def both(pair: pairs.Pair, name: str) -> tuple[Tensor, Tensor]:
    """(W1, W0) in memory of our own."""
    return Weights(pair.aligned)[name].clone(), Weights(pair.base)[name].clone()


def checked_tensor(model: pairs.Model) -> str:
    """The costliest matrix that the oracle does in seconds."""
    shape = max((s for s in model.matrices if s[0] * s[1] * min(s) <= CHECKED), key=lambda s: s[0] * s[1] * min(s))
    return model.first(shape)


def check(pair: pairs.Pair, name: str, result: Measured) -> Tensor:
    """The tensor `name` as the computation gives it, compared with the oracle; also warms everything up."""
    say(f"{pair.model.name}: comparing {name} with the oracle")
    w1, w0 = both(pair, name)
    found = torch.frombuffer(bytearray(alone(pair, Timing(), name)), dtype=w1.dtype).view(w1.shape)
    result.agreed = agreement(name, w1, w0, found, RANK, ALPHA).share
    if result.agreed < LAW:
        raise WrongResult(f"{pair.model.name}: {name} is {result.agreed:.4%} identical to the oracle, not {LAW:.2%}")
    return found


def compare(pair: pairs.Pair, out: Path, name: str, right: Tensor) -> None:
    """The program wrote what the library computed."""
    if same_bits(Weights(out)[name], right) != right.numel():
        raise WrongResult(f"{pair.model.name}: {name} in {out} is not what compute() gives")


def alone_table(results: list[Measured]) -> Table:
    rows = tuple(
        (
            r.pair.model.name,
            f"{sum(m * n * count for (m, n), count in r.pair.model.matrices.items()) / 1e6:.0f} M",
            f"{r.naive_s:.1f} s",
            str(r.alone),
            f"{r.pair.input_bytes / r.alone.median / 1e9:.2f} GB/s",
            f"{r.faster:.1f}x",
            "" if r.pair.model.target is None else f"{r.pair.model.target:g}x",
        )
        for r in results
    )
    heads = ("pair", "parameters", "naive way", "lox-stream", "of input", "faster", "target")
    notes = [
        "Inputs in the page cache, output discarded. Naive: float32 difference, full SVD, update; per shape, times "
        "count; on torch's default threads."
    ]
    notes += [
        f"NOT A QUIET MACHINE: before a repetition of {r.pair.model.name} other work took {max(r.others):.0%} of the "
        "cores. The naive way's threads suffer most, a hundredfold at worst: do not publish these figures."
        for r in results
        if max(r.others) > BUSY
    ]
    return Table("Computation alone", heads, rows, tuple(notes))


def end_to_end_table(results: list[Measured]) -> Table:
    rows = tuple(
        (
            r.pair.model.name,
            f"{r.pair.input_bytes / 1e9:.2f} + {r.pair.output_bytes / 1e9:.2f} GB",
            str(r.floor),
            str(r.alone),
            str(r.run),
            f"{r.startup.median:.2f} s",
            f"{r.over:.2f}x",
            f"{r.over_in_turn:.2f}x",
            f"{r.over_if_no_core_idled:.2f}x",
        )
        for r in results
    )
    heads = (
        "pair",
        "read + written",
        "IO floor",
        "computation",
        "run",
        "start-up",
        "over the larger",
        "in turn",
        "no core idle",
    )
    notes = [
        "Cold inputs, fresh output. Over the larger of floor and computation, start-up left out, to be at most "
        f"{END_TO_END_TARGET}x: median over median; the median over single repetitions; and what it would be if the "
        "work that the cores did in the run, the kernel's included, had kept all of them busy."
    ]
    notes += [
        f"{r.pair.model.name}: only {min(r.cold):.0%} of the inputs came from the disk in one repetition"
        for r in results
        if min(r.cold) < 0.9
    ]
    return Table("End to end", heads, rows, tuple(notes))


def memory_table(results: list[Measured]) -> Table:
    rows = tuple((r.pair.model.name, *(f"{r.peaks[budget] / 2**20:.0f} MiB" for budget in BUDGETS)) for r in results)
    limits = ("limit", *(f"{(size + MARGIN_BYTES) / 2**20:.0f} MiB" for size in BUDGETS.values()))
    heads = ("pair", *(f"--memory {budget}" for budget in BUDGETS))
    return Table("Peak RssAnon", heads, (*rows, limits), ("Sampled every 20 ms. The limit is the budget and 400 MiB.",))


def record(r: Measured) -> dict[str, Any]:
    """For the JSON line."""
    return {
        "identical_to_oracle": round(r.agreed, 6),
        "others_share": round(max(r.others), 3),
        "alone": r.alone.record(),
        "naive_s": round(r.naive_s, 3),
        "naive_shapes": {f"{m}x{n}": timing.record() for (m, n), timing in r.naive.items()},
        "faster": round(r.faster, 2),
        "faster_target": r.pair.model.target,
        "floor": r.floor.record(),
        "run": r.run.record(),
        "startup": r.startup.record(),
        "over_larger": round(r.over, 3),
        "over_larger_in_turn": round(r.over_in_turn, 3),
        "over_larger_if_no_core_idled": round(r.over_if_no_core_idled, 3),
        "over_larger_target": END_TO_END_TARGET,
        "cold_share": round(min(r.cold), 3),
        "peak_anon_bytes": r.peaks,
        "input_bytes": r.pair.input_bytes,
        "output_bytes": r.pair.output_bytes,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(pairs.MODELS), help="pairs to measure (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="one repetition on a tiny pair")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder of the pairs (12 GB free)")
    parser.add_argument("--keep", action="store_true", help="keep the pairs that were made; found ones stay anyway")
    args = parsed(parser, argv, 3)
    args.models = [pairs.SMOKE] if args.smoke else [pairs.MODELS.get(name) for name in args.only.split(",")]
    if None in args.models:
        parser.error(f"--only is {args.only!r}, expected some of {', '.join(pairs.MODELS)} with commas between")
    args.repeat = 1 if args.smoke else args.repeat
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    tiny, *made = (pairs.make(model, args.work) for model in (pairs.TINY, *args.models))
    try:
        results = [measure(pair, tiny, args.work, args.repeat) for pair in made]
    except WrongResult as problem:
        say(f"wrong result, no times: {problem}")
        return 1
    finally:
        for pair in (tiny, *made):
            if pair.made and not args.keep:
                shutil.rmtree(args.work / pair.model.name)
    tables = [alone_table(results), end_to_end_table(results), memory_table(results)]
    figures = {r.pair.model.name: record(r) for r in results}
    finish("bench_stream", tables, {"repeat": args.repeat, "pairs": figures}, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
