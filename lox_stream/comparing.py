"""Solvers side by side on one matrix: what each takes, and how right it is against float64."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lox_stream.c_library import c_function
from lox_stream.contenders import Contender, Found, Problem
from lox_stream.installed import way_to
from lox_stream.kernels import lowrank_update
from lox_stream.names import printable
from lox_stream.recomputing import BITS, rounded_once
from lox_stream.reference import Bands, Leading
from lox_stream.update import ROUNDED
from lox_stream.workers import Workers

ENOUGH = 2e-5  # share of differing elements after which a sweep need not go on: float32 itself leaves 1e-5
COARSE = 1e-2  # share of differing elements over which a result is timed once
SLOW_S, HOPELESS_S = 2.0, 20.0  # a solve that takes the first twice, or the second once, is not timed more often
CORE_FLOPS = 8e10  # float32 LAPACK at 4096 x 4096, one core of an AMD EPYC (Zen 4)


@dataclass(frozen=True, slots=True)
class Measured:
    """One solver at one value of its knob on one matrix."""

    case: str
    m: int
    n: int
    dtype: str
    rank: int
    gap: float  # (s_k - s_(k+1)) / s_k
    solver: str
    knob: str
    value: float
    method: str  # that the solver picked; "" where it has one
    elapsed_s: float  # median
    repeats: int
    passes: int | None  # over delta
    peak_bytes: int | None  # of the process, over what it held before; None where the system does not tell
    error: float  # |rank-k part - found|_F / |rank-k part|_F
    angle: float  # largest principal angle to the true singular subspaces, left or right, in radians
    energy_lost: float  # 1 - |delta V|_F^2 / sum(s^2), V the right factors
    differing: float  # share of output elements that are not bit-identical to the exact result
    predicted: float | None  # of `differing`, by the solver itself

    def reaches(self, share: float) -> bool:
        """Whether that share of the output elements is bit-identical."""
        return self.differing <= 1 - share


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A solver that was not run on a matrix, or gave nothing, and why."""

    case: str
    solver: str
    why: str


class Judge:
    """Measures results against the float64 triplets of one matrix."""

    def __init__(self, delta: Bands, leading: Leading, rank: int, alpha: float) -> None:
        self.alpha = alpha
        self._delta, self._w1 = delta, delta.w1
        self._dtype = delta.w1.dtype if delta.w1.dtype in ROUNDED else torch.bfloat16
        self._u, self._s, self._v = leading.u[:, :rank], leading.s[:rank], leading.vh[:rank].T
        self._exact = [self._exactly(band) for band in self._delta.slices]

    def _exactly(self, band: slice) -> Tensor:
        update = (self._u[band] * (self.alpha * self._s)) @ self._v.T
        return rounded_once(self._w1[band].double() + update, self._dtype)

    def measure(self, found: Found) -> dict[str, float]:
        """`error`, `angle`, `energy_lost` and `differing` of Measured."""
        u, s, v = found.u.double(), found.s.double(), found.vh.double().T
        inner = float(((self._u.T @ u) * (self._v.T @ v) * self._s[:, None] * s).sum())
        squares = float(self._s.square().sum())
        norm = float(((u.T @ u) * (v.T @ v) * s[:, None] * s).sum())
        q = torch.linalg.qr(v)[0]
        captured = sum(float((self._delta[band] @ q).square().sum()) for band in self._delta.slices)
        return {
            "error": math.sqrt(max(squares + norm - 2 * inner, 0.0) / squares),
            "angle": max(_angle(self._u, u), _angle(self._v, v)),
            "energy_lost": 1 - captured / squares,
            "differing": self._differing(u * (s * self.alpha), v.T),
        }

    def _differing(self, us: Tensor, vh: Tensor) -> float:
        wide = torch.float64 if self._w1.dtype == torch.float64 else torch.float32
        us, vh = us.to(wide), vh.to(wide)
        bits, same = BITS[self._dtype], 0
        for band, exact in zip(self._delta.slices, self._exact, strict=True):
            out = torch.empty(exact.shape, dtype=self._dtype)
            lowrank_update(self._w1[band], us[band], vh, out)
            same += int((out.view(bits) == exact.view(bits)).sum())
        return 1 - same / self._w1.numel()


def _angle(true: Tensor, found: Tensor) -> float:
    """Largest principal angle between the spans of the columns, by its sine (Bjorck and Golub 1973)."""
    q = torch.linalg.qr(found)[0]
    sine = float(torch.linalg.matrix_norm(true - q @ (q.T @ true), 2))
    return math.asin(min(sine, 1.0))


@dataclass(frozen=True, slots=True)
class Case:
    """A matrix to compare on."""

    name: str
    delta: Bands
    rank: int
    leading: Leading  # `rank` + 1 triplets at least


def compare(
    case: Case,
    contenders: Sequence[Contender],
    workers: Workers,
    *,
    alpha: float,
    repeats: int,
    limit_s: float,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Measured | LeftOut]:
    """Run each solver at its knob's values, from cheap to dear, until its result is as good as float32 gives it.

    Every setting runs once to be judged, and then `repeats` times in turns with the others, unless it is coarse, or
    slow twice. A solver that would take longer than `limit_s` is left out, or stops there.
    """
    problem = Problem(case.delta.w1, case.delta.w0, case.rank, alpha, seed, workers.run)
    judge = Judge(case.delta, case.leading, case.rank, alpha)
    judged: list[tuple[Measured, Callable[[], tuple[Found, float]]]] = []
    for contender in contenders:
        say(f"{printable(case.name)}, rank {case.rank}: {contender.name}")
        why = _excluded(contender, case, limit_s)
        if why:
            yield LeftOut(case.name, contender.name, why)
            continue
        values = contender.sweep(case.delta.w1.dtype)
        for value in values:
            work = _work(contender, value, problem, workers)
            try:
                row = _judged(case, contender, value, work, judge)
            except (RuntimeError, ArithmeticError, ValueError) as failure:  # LAPACK's and ARPACK's among them
                yield LeftOut(case.name, contender.name, f"{contender.knob} {value:g}: {str(failure).splitlines()[0]}")
                break
            judged.append((row, work))
            if row.differing <= ENOUGH or value == values[-1]:
                break
            if 2 * row.elapsed_s > limit_s:
                why = f"no further than {contender.knob} {value:g}: the next may take over the limit of {limit_s:g} s"
                yield LeftOut(case.name, contender.name, why)
                break
    times: list[list[float]] = [[] for _ in judged]
    quick = [row.differing < COARSE and _is_quick(row.elapsed_s, work) for row, work in judged]
    for _ in range(repeats):
        for (_, work), samples, again in zip(judged, times, quick, strict=True):
            if again:
                samples.append(work()[1])
    for (row, _), samples in zip(judged, times, strict=True):
        yield replace(row, elapsed_s=statistics.median(samples), repeats=repeats) if samples else row


def _is_quick(elapsed_s: float, work: Callable[[], tuple[Found, float]]) -> bool:
    """Whether a setting is timed several times. What was slow once is tried again: something else may have run then."""
    return elapsed_s < SLOW_S or (elapsed_s < HOPELESS_S and work()[1] < SLOW_S)


def _excluded(contender: Contender, case: Case, limit_s: float) -> str:
    if not contender.installed:
        return f"needs {contender.needs}: {way_to('bench')}"
    expected_s = contender.cubic_flops(*case.delta.w1.shape) / (CORE_FLOPS * (os.cpu_count() or 1))
    contender.load()
    if expected_s > limit_s:
        return f"would take about {expected_s:.3g} s, over the limit of {limit_s:g} s"
    return ""


def _work(contender: Contender, value: float, problem: Problem, workers: Workers) -> Callable[[], tuple[Found, float]]:
    """Solves and tells its seconds, taken in the thread that computes."""

    def here() -> tuple[Found, float]:
        started = time.perf_counter()
        found = contender.solve(problem, value)
        return found, time.perf_counter() - started

    return (lambda: workers.call(here)) if contender.in_worker else here


def _judged(
    case: Case, contender: Contender, value: float, work: Callable[[], tuple[Found, float]], judge: Judge
) -> Measured:
    with PeakMemory() as memory:
        found, elapsed_s = work()
    m, n = case.delta.w1.shape
    return Measured(
        case=case.name,
        m=m,
        n=n,
        dtype=str(case.delta.w1.dtype).removeprefix("torch."),
        rank=case.rank,
        gap=case.leading.gap(case.rank),
        solver=contender.name,
        knob=contender.knob,
        value=value,
        method=found.method,
        elapsed_s=elapsed_s,
        repeats=1,
        passes=found.passes,
        peak_bytes=memory.peak_bytes,
        predicted=found.predicted_share,
        **judge.measure(found),
    )


class PeakMemory:
    """Bytes that the process holds at most while the context lasts, over those at its begin (Linux, else None)."""

    peak_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        trim = c_function("malloc_trim")
        if trim is not None:
            trim(0)  # or what earlier solvers left would be used again, unseen
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
            self._before = _status_bytes("VmRSS")
        except OSError:
            self._before = -1
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before >= 0:
            self.peak_bytes = max(_status_bytes("VmHWM") - self._before, 0)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def fastest(rows: Iterable[Measured], share: float) -> dict[str, Measured]:
    """For each solver the fastest of its results that has `share` of the elements right."""
    best: dict[str, Measured] = {}
    for row in rows:
        if row.reaches(share) and (row.solver not in best or row.elapsed_s < best[row.solver].elapsed_s):
            best[row.solver] = row
    return best


def ranking(rows: Sequence[Measured], share: float) -> list[tuple[str, float]]:
    """(solver, seconds over all matrices) of those that have `share` right on every matrix; the fastest first."""
    matrices: dict[tuple[str, int], list[Measured]] = {}
    for row in rows:
        matrices.setdefault((row.case, row.rank), []).append(row)
    best = [fastest(found, share) for found in matrices.values()]
    everywhere = set.intersection(*(set(found) for found in best)) if best else set()
    total = {solver: sum(found[solver].elapsed_s for found in best) for solver in everywhere}
    return sorted(total.items(), key=lambda item: item[1])


def verdict(rows: Sequence[Measured], share: float) -> str:
    """The ranking in a sentence."""
    order = ranking(rows, share)
    count = len({(row.case, row.rank) for row in rows})
    at = f"at {100 * share:.10g} %" + ("" if count == 1 else f" over {count} matrices, their times added up,")
    if not order:
        return f"at {100 * share:.10g} % no solver gets there" + ("" if count == 1 else f" on each of {count} matrices")
    name, elapsed_s = order[0]
    if len(order) == 1:
        return f"{at} {name} is the only one that gets there, of {len({row.solver for row in rows})} tried"
    following, after_s = order[1]
    times = f"{after_s / elapsed_s:.1f} times"
    return f"{at} the fastest is {name}, {times} faster than the next, {following}"
